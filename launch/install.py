"""Sets up everything the project needs: system packages, a virtual environment, pinned packages, the package itself.

    python3 launch/install.py                      # into .venv, next to this checkout
    python3 launch/install.py --need-vulkan        # stop if the simulator could not render afterwards
    python3 launch/install.py --without-extras     # none of the packages that only the tests and some commands use

Standard library only. A second call finds the stamp of the first, checks it against what is installed, and returns.
pip is used with the configuration the machine gives it. `make` calls this; launch/doctor.py explains what is wrong.
"""

from __future__ import annotations  # this file runs under whatever Python 3 there is, to find a 3.11

import argparse
import glob
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import system

ROOT = Path(__file__).resolve().parents[1]
STAMP = "stare_jax_stamp.json"
LOG = "install.log"
PYTHON_NAMES = ("python3.11", "python3.12", "python3.13", "python3")
DISK_GB = 8
"""Twice what the environment takes with the CPU build of torch: pip unpacks beside what it has downloaded."""
EXTRAS = "# --- extras"
"""begins the last section of requirements.txt, which not everybody needs"""

REMEDIES = {
    r"No space left on device": "The disk is full: free some space and run this again; it continues.",
    r"name resolution|NewConnectionError|ConnectTimeout|Read timed out|Connection(?:Reset)?Error|ProxyError": (
        "The package index did not answer. Check the network and the proxy (`pip config list` shows what pip uses)."
    ),
    r"CERTIFICATE_VERIFY_FAILED": (
        "The index's certificate is not trusted here: name your organisation's with `pip config set global.cert FILE`."
    ),
    r"No matching distribution found|Could not find a version": (
        "The index pip is configured for (`pip config list`) lacks this version, or has no build of it for this Python:"
        " Python 3.11 on 64-bit Linux is what the pins are made for."
    ),
    r"Python\.h: No such file|gcc.* failed|command '.*(?:gcc|cc|c\+\+)' failed|Microsoft Visual C": (
        "A package had to be compiled: install a compiler and Python's headers, on Debian and Ubuntu"
        " `sudo apt-get install build-essential python3.11-dev`."
    ),
    r"ResolutionImpossible|conflicting dependencies": "The pins contradict each other: was requirements.txt edited?",
}
"""Returns the remedy for a failure of pip, by the text of its log."""


class Failed(Exception):
    """The set-up cannot go on; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------- Python


def python_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of an interpreter that runs, else None (pyenv leaves names behind that do not)."""
    try:
        code = "import sys; print(*sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30)
        major, minor = done.stdout.split()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return int(major), int(minor)


def find_python() -> str:
    """A Python 3.11, else a newer one: the running one, by name on the PATH, or from pyenv's folder.

    Raises:
        Failed: there is none.
    """
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = [sys.executable, *PYTHON_NAMES, *sorted(glob.glob(f"{pyenv}/versions/3.1[1-3]*/bin/python"))]
    found = {python: version for python in candidates if (version := python_version(python)) and version >= (3, 11)}
    if not found:
        raise Failed(
            "Python 3.11 or newer is needed and none was found. Debian 12: `sudo apt-get install python3.11-venv`;"
            " elsewhere `pyenv install 3.11`, or `uv python install 3.11`, or conda."
        )
    best = min(found, key=lambda python: found[python])
    if found[best] != (3, 11):
        print("  note: the pins are made and tested with Python 3.11; this is {}.{}".format(*found[best]))
    return best


def is_usable(venv: Path) -> bool:
    """True where the environment's Python runs and is new enough."""
    return (python_version(str(venv / "bin/python")) or (0, 0)) >= (3, 11)


def make_venv(venv: Path) -> None:
    """Creates the environment, in place of one whose Python does not run."""
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise Failed(f"{venv} is in the way: it is not a virtual environment, and not empty")
    python = find_python()
    shutil.rmtree(venv, ignore_errors=True)
    done = subprocess.run([python, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{python} -m venv {venv} failed:\n{done.stdout}{done.stderr}")


# ---------------------------------------------------------------------------------------------- packages


def requirements(*, with_extras: bool) -> str:
    """The text of requirements.txt, or what stands before its section of extras."""
    text = (ROOT / "requirements.txt").read_text("utf-8")
    return text if with_extras else text.partition(EXTRAS)[0]


def read_pins(text: str) -> dict[str, str]:
    """Package name (normalised) -> exact version, of the lines `name==version`."""
    pins = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;]+)", text, flags=re.MULTILINE)
    return {normalise(name): version for name, version in pins}


def normalise(name: str) -> str:
    """`ml_collections` -> `ml-collections`, as package indices compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(venv: Path) -> dict[str, str]:
    """Package name (normalised) -> version without its local part (`2.13.0+cpu` -> `2.13.0`)."""
    folders = [str(folder) for folder in venv.glob("lib/python3*/site-packages")]
    packages = metadata.distributions(path=folders)
    return {normalise(package.metadata["Name"]): package.version.partition("+")[0] for package in packages}


def differences(pins: dict[str, str], have: dict[str, str]) -> list[str]:
    """Returns the packages that the environment lacks, as `name 1.0 (have 0.9)`."""
    return [f"{name} {want} (have {have.get(name, 'none')})" for name, want in pins.items() if have.get(name) != want]


def fingerprint() -> str:
    """A hash of all that decides what is installed, this checkout's place included (the package is linked to it)."""
    parts = [str(ROOT).encode(), *((ROOT / name).read_bytes() for name in ("requirements.txt", "setup.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def write_stamp(venv: Path) -> None:
    """Notes what the environment was made from."""
    (venv / STAMP).write_text(json.dumps({"fingerprint": fingerprint()}), "utf-8")


def is_current(venv: Path, *, with_extras: bool) -> bool:
    """True where the stamp fits the files and the environment holds all that is wanted, and perhaps more."""
    try:
        stamp = json.loads((venv / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    pins, have = read_pins(requirements(with_extras=with_extras)), installed(venv)
    return stamp.get("fingerprint") == fingerprint() and "stare-jax" in have and not differences(pins, have)


def install_packages(venv: Path, *, with_extras: bool) -> None:
    """Torch first, by itself: the one package whose build depends on the machine, and the largest."""
    free = shutil.disk_usage(venv).free / 1e9
    if free < DISK_GB:
        print(f"  warning: {free:.1f} GB free on this disk; the installation wants about {DISK_GB}")
    text, wanted = requirements(with_extras=with_extras), venv / "requirements.txt"
    wanted.write_text(text, "utf-8")
    torch = f"torch=={read_pins(text)['torch']}"
    if "torch" not in installed(venv) and not system.has_nvidia_gpu():
        print(
            "  No NVIDIA driver here: the CPU build of torch (200 MB) is enough. If pip's index serves only the CUDA\n"
            "  build (several GB, works as well), name a CPU index (pytorch.org, Get Started) and start over."
        )
    have = set(installed(venv))
    missing = [name for name in read_pins(text) if name not in have]
    pip(venv, ["-c", str(wanted), torch], "torch", 12)
    pip(venv, ["-r", str(wanted)], "packages", max(1, len(missing)))
    pip(venv, ["--no-deps", "-e", str(ROOT)], "stare_jax", 1)
    left = differences(read_pins(text), installed(venv))
    if left:
        raise Failed(f"pip reported success but the environment differs from requirements.txt: {', '.join(left)}")


def pip(venv: Path, arguments: list[str], label: str, expected: int) -> None:
    """Runs `pip install`, shows its progress as it goes, keeps its output in the log.

    Raises:
        Failed: with the end of the log and, where the log tells, the remedy.
    """
    # Python compiles a module when it is first imported; pip would spend minutes on all of them.
    quick = ["--no-compile", "--progress-bar", "off", "--no-input"]
    command = [str(venv / "bin/python"), "-m", "pip", "install", *arguments, *quick]
    start = time.monotonic()
    with open(venv / LOG, "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        pipe = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, **pipe) as process:
            tail = follow(process.stdout, log, Progress(label, expected))
    if process.returncode:
        said = "".join(tail)
        hints = [remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, said)]
        remedy = hints[0] if hints else "Run it again: what is installed is kept."
        raise Failed(f"pip failed on {label}; the end of {venv / LOG}:\n\n{''.join(tail[-20:])}\n{remedy}")
    print(f"  {label}: done in {time.monotonic() - start:.0f} s", flush=True)


class Progress:
    """One line on a terminal, a line every ten seconds elsewhere: pip's own bars are for one download at a time."""

    def __init__(self, label: str, expected: int):
        self.label, self.expected, self.count, self.now = label, expected, 0, "starting"
        self.start = self.shown = time.monotonic()

    def done(self) -> str:
        return f"{min(self.count, self.expected)}/{self.expected}"

    def line(self, text: str) -> None:
        words = text.split()
        if text.startswith(("Collecting ", "Requirement already")):
            self.count += text.startswith("Collecting ")
            self.now = f"{self.done()} {' '.join(words[:2]).lower()}"
        elif text.startswith("  Downloading "):
            size = re.search(r"\([^)]*\)$", text.strip())
            self.now = f"{self.done()} {words[1].split('-')[0]} {size.group() if size else ''}"
        elif text.startswith(("Installing collected", "Building", "Preparing")):
            self.now = " ".join(words[:3]).lower().rstrip(":")

    def show(self) -> None:
        seconds = time.monotonic()
        text = f"  {self.label}: {self.now.strip()}, {seconds - self.start:.0f} s"
        if sys.stdout.isatty():
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif seconds - self.shown >= 10:
            self.shown = seconds
            print(text, flush=True)

    def clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")


def follow(stream, log, progress: Progress) -> list[str]:
    """Copies the stream to the log while progress is shown once a second; returns the last lines."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    tail: list[str] = []
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            progress.show()
            continue
        if line is None:
            progress.clear()
            return tail
        log.write(line)
        tail = [*tail[-39:], line]
        progress.line(line)
        progress.show()


# ---------------------------------------------------------------------------------------------- command line


def venv_packages(venv: Path) -> list[str]:
    """Returns system packages that a new environment needs: Debian and Ubuntu ship Python's `venv` without its pip."""
    if is_usable(venv):
        return []
    python = find_python()
    has_ensurepip = subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
    return [] if has_ensurepip else ["python{}.{}-venv".format(*python_version(python))]


def install_system(venv: Path, need_vulkan: bool) -> None:
    """All that is missing; where the simulator's part cannot be had, says what to ask for and goes on if it may."""
    problem = system.vulkan_problem()
    for_venv = venv_packages(venv)
    packages = [*for_venv, *([system.MESA_PACKAGE] if problem else []), *system.missing_libraries()]
    if not packages:
        return
    print(f"System packages: {', '.join(packages)}" + (f"\n  ({problem})" if problem else ""), flush=True)
    try:
        system.install(packages)
    except system.Unsupported as error:
        if need_vulkan or packages == for_venv:
            raise
        print(f"  NOT INSTALLED: {error}\n  Going on: all but the simulator works without.", flush=True)
        if for_venv:
            system.install(for_venv)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venv", type=os.path.expanduser, default=ROOT / ".venv", help="where the environment goes (default: .venv)"
    )
    parser.add_argument("--need-vulkan", action="store_true", help="stop if the simulator could not render")
    parser.add_argument("--without-extras", action="store_true", help="leave the extras of requirements.txt out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    venv, chosen = Path(arguments.venv).absolute(), {"with_extras": not arguments.without_extras}
    start = time.monotonic()
    try:
        install_system(venv, arguments.need_vulkan)
        if is_usable(venv) and is_current(venv, **chosen):
            return 0
        print(f"Python environment in {venv} (log: {venv / LOG})", flush=True)
        if not is_usable(venv):
            make_venv(venv)
        (venv / STAMP).unlink(missing_ok=True)
        install_packages(venv, **chosen)
        write_stamp(venv)
    except (Failed, system.Unsupported) as error:
        print(f"\nset-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    print(f"Set up in {time.monotonic() - start:.0f} s. `make doctor` checks it.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
