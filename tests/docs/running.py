"""The command lines of the pages, run as they stand in a copy of the repository, made small by words behind them."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from documented import PAGES, ROOT, commands_of, words_of

FEW = (
    "--config.env.num_workers=1",
    "--config.env.envs_per_worker=2",
    "--config.demos.num_demos=6",
    "--config.sft.num_steps=30",
    "--config.sft.batch_size=16",
    "--config.sft.log_every=10",
    "--config.pairs.num_pairs=2",
    "--config.pairs.max_rollouts=32",
    "--config.pairs.temperature=2.0",
    "--config.tpo.num_epochs=1",
    "--config.ppo.num_iterations=1",
    "--config.ppo.num_episodes=4",
    "--config.ppo.minibatch_size=32",
    "--config.evaluation.num_episodes=2",
    "--config.evaluation.num_videos=1",
)
SHALLOW = (
    "--config.model.dino.depth=2",
    "--config.model.siglip.depth=2",
    "--config.model.llm.depth=1",
    "--config.model.execution.unroll=1",
    "--config.model.decode_unroll=1",
)
SIMULATORS = ("--num-workers=1", "--envs-per-worker=2")
MEASURED_ONCE = ("--batch=1", "--repeats=1", "--passes=1")
SMALL = (
    (r"train\.py .*--plan|train\.py .*--help", ()),
    # A flow that has learnt less passes no stage in any rollout, which makes no pair.
    (r"make quickstart .*pi05", (*FEW, "--config.demos.num_demos=16", "--config.sft.num_steps=200")),
    (r"make quickstart|train\.py --config=configs/quickstart\.py", FEW + SHALLOW),
    (r"train\.py --config=configs/sft_bridge\.py", ("--config.sft.num_steps=4", "--config.sft.batch_size=4", *SHALLOW)),
    (r"train\.py", FEW),
    (r"study\.py", (*FEW, "--only=StackCube-v1/ppo/seed_0", "--only=StackCube-v1/sta_ppo/seed_0")),
    (r"evaluate\.py", ("--num-episodes=2", *SIMULATORS)),
    (r"collect\.py .*--demos=\d+ --pairs", ("--demos=2", "--pairs=1", *SIMULATORS)),
    (r"collect\.py .*--demos=\d+", ("--demos=2", *SIMULATORS)),
    (r"collect\.py --pairs", ("--pairs=1", "--max-rollouts=8", *SIMULATORS)),
    (r"convert\.py .*--model=pi05", ("--model=given/pi05.json",)),
    (r"serve\.py --checkpoint", ("--port=0", "--max-batch=2")),
    (r"plan\.py --config=configs/ipi_", ("--programs=sample",)),
    (r"plan\.py --config=configs/quickstart\.py", ("--tries=1",)),
    (r"benchmarks/openvla\.py", ("--update-batch=2", "--microbatch=2", *MEASURED_ONCE)),
    (r"benchmarks/pi05\.py", ("--steps=2", "--train-batch=2", *MEASURED_ONCE)),
    (r"benchmarks/rebuild\.py", ("--rounds=2",)),
    (r"benchmarks/serve\.py", ("--seconds=0.2", "--passes=1", "--clients", "1")),
    (r"benchmarks/render_size\.py", ("--states=2",)),
    (r"benchmarks/rollout\.py", ("--quick", "--workers=2", "--envs-per-worker=2", "--reset-task=PushCube-v1")),
    (r"benchmarks/imitation\.py", ("--tasks", "PushCube-v1", "--demos=4", "--steps=20", "--episodes=4")),
    (r"benchmarks/plan_table\.py", ("--show",)),
    (r"fuzz/damages\.py", ("--damages=20",)),
    (r"make fuzz", ("--times=0.005",)),
    (r"make test ", ("tests/losses/test_losses_returns.py",)),
    (r"make test-slow", ("--collect-only", "tests/launch/test_import_rlds.py")),
)
"""Words of a command -> what is put behind it, so that it takes seconds or a minute; the first that is found counts."""
ELSEWHERE = {"=/data/": "=given/", "=DIR/": "=given/"}
"""Places of a reader's machine -> theirs in the copy."""
SECONDS = 1200
SERVER = "launch/serve.py"


class Line(NamedTuple):
    """A command line, once, however many pages have it."""

    page: str
    words: tuple[str, ...]
    server: tuple[str, ...] = ()
    """words of the server that has to be there, the last before this line on its page."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def lines() -> list[Line]:
    """Returns the command lines that are not marked, in the order in which a reader meets them."""
    found: dict[tuple[str, ...], Line] = {}
    for page in PAGES:
        server: tuple[str, ...] = ()
        for command in commands_of(page, (ROOT / page).read_text("utf-8")):
            words = tuple(words_of(command.line))
            server = words if SERVER in words else server
            if not command.is_marked and words not in found:
                is_client = any(word.startswith("--policy=ws://") for word in words)
                found[words] = Line(page, words, server if is_client else ())
    served = {line.server for line in found.values()}
    return [line for line in found.values() if line.words not in served]


def appended(words: Sequence[str]) -> tuple[str, ...]:
    """Returns what is put behind a command so that it is small."""
    text = " ".join([*words, ""])
    return next((more for pattern, more in SMALL if re.search(pattern, text)), ())


def spelled(words: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """Returns the words to start a process with: those of the page, and behind them what makes them small."""
    for name, place in ELSEWHERE.items():
        words = [word.replace(name, place) for word in words]
    more = [*appended(words), *more]
    if words[0] == "source":
        return ["bash", "-c", shlex.join(words)]
    if words[0] != "make":
        return [*words, *more]
    given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    rest = [word for word in words if not word.startswith("ARGS=")]
    # The environment is that of the tests, and is not changed by one of them.
    return [*rest, "-o", "setup", "-o", "setup-vulkan", f"PYTHON={sys.executable}", f"ARGS={' '.join([*given, *more])}"]


class Workplace:
    """A copy of the repository's files, with a home of its own, in which commands are run one after another."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stare_jax_commands_"))
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        (self.folder / "home").mkdir()
        (self.folder / ".venv").symlink_to(sys.prefix)
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
        env |= {
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
            "PYTHONPATH": str(self.folder),
        }
        env.setdefault("MS_ASSET_DIR", str(Path.home() / ".maniskill"))
        self.env = env

    def start(self, words: Sequence[str], log) -> subprocess.Popen:
        """Starts a process in a session of its own, whose processes all get a signal, as from Ctrl-C in a terminal."""
        settings = {"cwd": self.folder, "env": self.env, "stdin": subprocess.DEVNULL, "start_new_session": True}
        # A signal that is ignored here, as Ctrl-C is in the background of a script, would be ignored there, too.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, **settings)
        finally:
            signal.signal(signal.SIGINT, previous)

    def run(self, words: Sequence[str], code: int = 0) -> None:
        """Runs a command to its end, which has to be this exit code, and no traceback."""
        with tempfile.TemporaryFile("w+b") as log:
            process = self.start(words, log)
            try:
                got = process.wait(timeout=SECONDS)
            finally:
                _end(process)
            text = _text(log)
        assert got == code and "Traceback" not in text, f"{shlex.join(words)}\nexit code {got}\n{text[-3000:]}"

    @contextlib.contextmanager
    def serving(self, words: Sequence[str], code: int) -> Iterator[str]:
        """Starts a server, yields its address once it listens, and stops it with Ctrl-C; see `run`."""
        with tempfile.TemporaryFile("w+b") as log:
            process = self.start(words, log)
            try:
                deadline = time.monotonic() + SECONDS
                while not (found := re.search(r"(ws|http)://127\.0\.0\.1:\d+", _text(log))):
                    assert process.poll() is None and time.monotonic() < deadline, _text(log)
                    time.sleep(0.2)
                yield found[0]
                os.killpg(process.pid, signal.SIGINT)
                got = process.wait(timeout=60)
            finally:
                _end(process)
            text = _text(log)
        assert got == code and "Traceback" not in text, f"{shlex.join(words)}\nexit code {got}\n{text[-3000:]}"

    def give(self, name: str) -> None:
        """Puts there what a reader has already, see `given.py`, in a process of its own."""
        if not (self.folder / name).exists():
            self.run([sys.executable, "tests/docs/given.py", name])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _text(log) -> str:
    """Returns what a process has printed so far; its own place in the file is not moved."""
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode("utf-8", "replace")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
