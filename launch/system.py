"""The simulator's needs from the operating system: a Vulkan driver and a few shared libraries.

SAPIEN renders through Vulkan. Without a GPU that is Mesa's software driver (lavapipe), which has the extension SAPIEN
asks for (VK_KHR_external_semaphore_fd) since Mesa 24.3. Debian 12 ships 22.3 and has a newer one in its backports
suite, on the same mirror as its other suites, so the mirror is read from the machine's own apt configuration.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations  # see install.py

import ctypes
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MESA_MINIMUM = (24, 3)
MESA_PACKAGE = "mesa-vulkan-drivers"
BACKPORTS_FILE = "/etc/apt/sources.list.d/stare-jax-backports.sources"
ICD_FOLDERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
LIBRARIES = {
    "libvulkan.so.1": "libvulkan1",
    # OpenCV, which SAPIEN depends on, is linked against these; a minimal installation or a container has none of them.
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libX11.so.6": "libx11-6",
    "libXext.so.6": "libxext6",
    "libSM.so.6": "libsm6",
}
"""Shared library -> Debian package (newer releases provide the old names)."""


class Unsupported(Exception):
    """The machine cannot be set up from here; the message says what would."""


class AptSource(NamedTuple):
    """One apt source, from either of the two file formats."""

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str]
    """The other fields under their deb822 names, e.g. `Signed-By`; values verbatim (a key may stand in the file)."""


class Step(NamedTuple):
    """A command for root; `stdin` is what it reads."""

    argv: tuple[str, ...]
    stdin: str = ""


# ---------------------------------------------------------------------------------------------- what is there


def named_icd_files() -> list[str]:
    """The manifests the environment tells Vulkan to use instead of those it would find."""
    return [p for v in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") for p in os.environ.get(v, "").split(":") if p]


def icd_files(folders=ICD_FOLDERS) -> list[str]:
    """The Vulkan driver manifests on this machine, those named in the environment first."""
    found = [p for folder in folders for p in sorted(glob.glob(os.path.join(folder, "*.json")))]
    return list(dict.fromkeys(named_icd_files() + found))


def lavapipe_icd() -> str | None:
    """The manifest of Mesa's software driver, if installed."""
    return next((p for p in icd_files() if os.path.basename(p).startswith("lvp_icd")), None)


def has_nvidia_gpu() -> bool:
    """True where the NVIDIA kernel driver offers a GPU."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def has_nvidia_vulkan() -> bool:
    """True where an NVIDIA GPU and its Vulkan driver are there (containers often lack the second)."""
    return has_nvidia_gpu() and any(os.path.basename(p).startswith("nvidia") for p in icd_files())


def mesa_version() -> tuple[int, ...] | None:
    """The version of the installed Mesa Vulkan drivers, None if unknown."""
    text = _output(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", MESA_PACKAGE])
    if text.startswith("installed "):
        return parse_version(text.split()[1])
    match = re.search(r"driverInfo\s*=\s*Mesa (\S+)", _output(["vulkaninfo", "--summary"]))
    return parse_version(match.group(1)) if match else None


def missing_libraries() -> list[str]:
    """Packages of the shared libraries that the loader does not find."""
    return [package for library, package in LIBRARIES.items() if not _loads(library)]


def vulkan_problem() -> str | None:
    """Why the simulator could not render here, None if nothing speaks against it."""
    if has_nvidia_vulkan():
        return None
    if lavapipe_icd() is None:
        return "no Vulkan driver: neither NVIDIA's nor Mesa's software driver (lavapipe) is installed"
    version = mesa_version()
    if version is not None and version < MESA_MINIMUM:
        return f"Mesa {dotted(version)} is too old for SAPIEN: {dotted(MESA_MINIMUM)} or newer is needed"
    return None


# ---------------------------------------------------------------------------------------------- parsing


def parse_version(text: str) -> tuple[int, ...]:
    """`1:25.0.7-2~bpo12+1` -> (25, 0, 7)."""
    upstream = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", text)
    if upstream is None:
        raise ValueError(f"version: expected digits, got {text!r}")
    return tuple(int(part) for part in upstream.group(1).split("."))


def parse_os_release(text: str) -> dict[str, str]:
    """The fields of /etc/os-release, unquoted."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): "".join(shlex.split(value)) if value else "" for key, value in pairs}


def parse_deb822(text: str) -> list[AptSource]:
    """The enabled sources of a `.sources` file."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    sources = []
    for stanza in re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n")):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip()
                fields[name] = value.strip()
        lists = {key.lower(): tuple(value.split()) for key, value in fields.items()}
        if not lists.get("uris") or lists.get("enabled", ("yes",)) == ("no",):
            continue
        standard = ("types", "uris", "suites", "components")
        options = {k: v for k, v in fields.items() if k.lower() not in (*standard, "enabled")}
        sources.append(AptSource(*(lists.get(key, ()) for key in standard), options))
    return sources


def parse_sources_list(text: str) -> list[AptSource]:
    """The sources of a classic `.list` file."""
    plural = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}
    sources = []
    for line in text.splitlines():
        match = re.match(r"\s*(deb|deb-src)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)([^#]*)", line)
        if match is None:
            continue
        kind, options, uri, suite, components = match.groups()
        pairs = (option.split("=", 1) for option in (options or "").split() if "=" in option)
        named = {plural.get(key, key.title()): value.replace(",", " ") for key, value in pairs}
        sources.append(AptSource((kind,), (uri,), (suite,), tuple(components.split()), named))
    return sources


def parse_policy(text: str) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The candidate and all (version, suite) of `apt-cache policy PACKAGE`; suite None: installed only."""
    candidate = re.search(r"Candidate: (\S+)", text)
    versions: list[tuple[str, str | None]] = []
    for line in text.partition("Version table:")[2].splitlines():
        if entry := re.match(r"(?: {5}| \*\*\* )(\S+) -?\d+$", line):
            versions.append((entry.group(1), None))
        elif versions and (origin := re.match(r" {6,}-?\d+ \S+ ([^/\s]+)/\S+ ", line)):
            versions[-1] = (versions[-1][0], versions[-1][1] or origin.group(1))
    is_none = candidate is None or candidate.group(1) == "(none)"
    return (None if is_none else candidate.group(1)), versions


# ---------------------------------------------------------------------------------------------- planning


def backports_stanza(sources: list[AptSource], codename: str) -> str | None:
    """The deb822 text that adds `<codename>-backports` from the mirror that serves the machine's main suite.

    Third parties use the codename as their suite, too; the distribution's own mirror is the one that also serves
    `<codename>-updates`, or whose path names the distribution.
    """
    updates = {uri for source in sources for uri in source.uris if f"{codename}-updates" in source.suites}
    candidates = [
        (uri not in updates, "debian" not in uri.split("://")[-1].partition("/")[2], uri, source)
        for source in sources
        for uri in source.uris
        if "deb" in source.types and {codename, "stable"} & set(source.suites) and "main" in source.components
    ]
    if not candidates:
        return None
    _, _, uri, source = min(candidates, key=lambda candidate: candidate[:2])
    fields = {"Types": "deb", "URIs": uri, "Suites": f"{codename}-backports", "Components": "main", **source.options}
    return "".join(f"{key}:{'' if value[:1] == chr(10) else ' '}{value}\n" for key, value in fields.items())


def suite_of_new_mesa(policy: str) -> str | None:
    """The suite to name with -t ("" where apt's default choice is new enough); None if apt knows no such version."""
    candidate, versions = parse_policy(policy)
    if candidate and parse_version(candidate) >= MESA_MINIMUM:
        return ""
    return next((suite for version, suite in versions if suite and parse_version(version) >= MESA_MINIMUM), None)


def plan(release: dict[str, str], policy: str, sources: list[AptSource], packages: list[str]) -> list[Step]:
    """The commands that install `packages`, Mesa among them or not, given what apt knows now.

    Raises:
        Unsupported: the release has no Mesa that is new enough.
    """
    if MESA_PACKAGE not in packages:
        return [_install(packages)]
    suite = suite_of_new_mesa(policy)
    if suite is not None:
        return [_install(packages, suite)]
    name = release.get("PRETTY_NAME", "this system")
    if (release.get("ID"), release.get("VERSION_ID")) != ("debian", "12"):
        have = parse_policy(policy)[0] or "none"
        raise Unsupported(
            f"{name}: apt offers Mesa {have}, and SAPIEN needs {dotted(MESA_MINIMUM)} or newer. Use a machine with an"
            " NVIDIA driver, or Debian 12 or newer, or Ubuntu 24.04 or newer with its -updates suite enabled."
        )
    codename = release["VERSION_CODENAME"]
    stanza = backports_stanza(sources, codename)
    if stanza is None:
        raise Unsupported(
            f"{name}: no apt source serves the suite {codename} (main), so its backports suite cannot be derived."
            f" Add {codename}-backports to your apt sources and run this again."
        )
    return [Step(("tee", BACKPORTS_FILE), stanza), _apt_get("update"), _install(packages, f"{codename}-backports")]


def as_text(steps: list[Step]) -> str:
    """The commands as an administrator would type them."""
    lines = []
    for step in steps:
        lines.append("sudo " + shlex.join(step.argv) + (f" <<'END'\n{step.stdin}END" if step.stdin else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- doing


def root_prefix() -> list[str] | None:
    """Returns the words before a command that needs root; None if nobody but an administrator can become root."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    if sys.stdin.isatty() or subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo"]
    return None


def machine_sources() -> list[AptSource]:
    """Every apt source configured on this machine."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    parsers = {".sources": parse_deb822, ".list": parse_sources_list}
    read = [f for f in files if f.suffix in parsers and os.access(f, os.R_OK)]
    texts = ((parsers[f.suffix], f.read_text("utf-8", "replace")) for f in read)
    return [source for parse, text in texts for source in parse(text)]


def install(packages: list[str]) -> None:
    """Installs Debian packages, Mesa from a suite where it is new enough.

    Raises:
        Unsupported: no apt, no root, a release without a Mesa that is new enough, or a command that failed.
    """
    if shutil.which("apt-get") is None:
        raise Unsupported(
            "this system has no apt: install, with its own package manager, a Mesa Vulkan driver with lavapipe"
            f" ({dotted(MESA_MINIMUM)} or newer), the Vulkan loader, libGL, glib2, libX11, libXext, libSM"
        )
    root = root_prefix()
    if root is not None:
        # An unrelated source that does not answer is no reason to stop: what counts is the installation.
        _run(root, _apt_get("update"), check=False)
    release = parse_os_release(Path("/etc/os-release").read_text("utf-8", "replace"))
    steps = plan(release, _output(["apt-cache", "policy", MESA_PACKAGE]), machine_sources(), packages)
    if root is None:
        commands = as_text([_apt_get("update"), *steps])
        raise Unsupported(f"this account cannot become root; ask an administrator to run\n\n{commands}\n")
    had_backports_file = os.path.exists(BACKPORTS_FILE)
    try:
        for step in steps:
            _run(root, step)
    except Unsupported:
        if not had_backports_file:
            _run(root, Step(("rm", "-f", BACKPORTS_FILE)), check=False)
        raise


def _install(packages: list[str], suite: str = "") -> Step:
    target = ("-t", suite) if suite else ()
    return _apt_get("install", "-y", "--no-install-recommends", *target, *packages)


def _apt_get(*arguments: str) -> Step:
    return Step(("apt-get", *arguments))


def _run(root: list[str], step: Step, check: bool = True) -> None:
    print(f"  $ {shlex.join([*root, *step.argv])}", flush=True)
    argv = [*root, "env", "DEBIAN_FRONTEND=noninteractive", *step.argv]
    if step.argv[0] == "apt-get":
        # Another apt (unattended upgrades on a fresh machine) may hold the lock for minutes.
        argv += ["-o", "DPkg::Lock::Timeout=300"]
    done = subprocess.run(argv, input=step.stdin or None, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if check and done.returncode:
        raise Unsupported(f"{shlex.join(step.argv)} failed ({done.returncode}):\n{done.stdout[-2000:]}")


def _output(argv: list[str]) -> str:
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=30, env={**os.environ, "LC_ALL": "C"}
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
