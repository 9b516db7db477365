"""Kills a run with SIGKILL at random moments, goes on with it by the same command, and compares it, bit by bit, with a
run of the same configuration that nobody killed.

    python benchmarks/kill.py --kills=50 --workdir=/tmp/kills        PushCube from images, all phases; hours
    python benchmarks/kill.py --kills=3 --workdir=/tmp/kills --seed=1

Says of every kill what the run was doing, and in the end how many runs were lost, which is those that did not go on or
did not come to their end, and what differs. Exit code 1 where there is any of either.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stare_jax.config import UserError, home_path  # noqa: E402
from stare_jax.data.pairs import read_pairs  # noqa: E402
from stare_jax.data.reader import Dataset  # noqa: E402
from stare_jax.documents import read_json  # noqa: E402
from stare_jax.evaluate.record import load_results  # noqa: E402
from stare_jax.logging import HEARTBEAT_FILE, last_lines, read_metrics, replace_text  # noqa: E402
from stare_jax.runs.config import PHASES  # noqa: E402
from stare_jax.state import checkpoint, storage  # noqa: E402
from stare_jax.state.train_state import CHECKPOINTS  # noqa: E402

SMALL = (
    "--config.env.envs_per_worker=2",
    "--config.demos.num_demos=16",
    "--config.demos.write_every=8",
    "--config.sft.num_steps=200",
    "--config.sft.batch_size=16",
    "--config.sft.log_every=20",
    "--config.sft.checkpoint_every=40",
    "--config.pairs.num_pairs=2",
    "--config.pairs.max_rollouts=32",
    "--config.pairs.write_every=1",
    "--config.pairs.temperature=1.0",
    "--config.tpo.num_epochs=4",
    "--config.tpo.checkpoint_every=2",
    "--config.ppo.num_iterations=4",
    "--config.ppo.num_episodes=4",
    "--config.ppo.minibatch_size=32",
    "--config.ppo.checkpoint_every=1",
    "--config.evaluation.num_episodes=4",
    "--config.evaluation.num_videos=1",
)
"""Fields of a run of minutes on two cores."""


class Kill(NamedTuple):
    """A run that was killed."""

    seconds: float
    """Seconds after its process had begun."""
    place: str
    """work that it was at, see `place_of`."""


class Outcome(NamedTuple):
    """All that became of runs that were killed."""

    kills: list[Kill]
    lost: list[str]
    """Doings of the run that did not go on; [] if all came to their end."""
    different: list[str]
    """names of what differs from the run that nobody killed."""


def contents_of(directory: Path) -> dict[str, Any]:
    """Returns all that has to be the same in two runs, by name: parameters, counters, history, data, report numbers.

    Names of checkpoints hold the time of writing, and are left out with all other times.
    """
    found: dict[str, Any] = {"norm_stats": read_json(directory / "norm_stats.json")}
    lines = read_metrics(directory)
    for phase in sorted({line["phase"] for line in lines}):
        history = [{name: repr(x) for name, x in line.items() if _is_result(name)} for line in last_lines(lines, phase)]
        found[f"{phase}: history"] = history
    for phase in PHASES:
        checkpoints = directory / phase / CHECKPOINTS
        steps = checkpoint.complete_steps(checkpoints)
        found[f"{phase}: steps"], found[f"{phase}: parameters"] = steps, _params(checkpoints)
        found[f"{phase}: counters"] = checkpoint.load_counters(checkpoints)
    for folder in (directory / "data" / "demos", directory / "tpo" / "pairs"):
        manifest = Dataset(folder).manifest
        rows = [[str(x) for name, x in row._asdict().items() if name != "source"] for row in manifest.episodes]
        found[f"{folder.name}: rows"], found[f"{folder.name}: progress"] = rows, manifest.progress
        found[f"{folder.name}: frames"] = [shard.frames.sha256 for shard in manifest.shards]
    found["pairs: pairs"] = read_pairs(directory / "tpo" / "pairs")
    for result in load_results(directory):
        info = result.evaluation.info._replace(wall_s=0.0, checkpoint="")
        episodes = {name: column.tolist() for name, column in result.evaluation.episodes._asdict().items()}
        found[f"{result.phase}: evaluation"] = [repr(info), episodes, repr(result.summary)]
    return found


def _is_result(metric: str) -> bool:
    return metric != "wall_time" and metric.partition("/")[0] not in ("time", "perf")


def _params(checkpoints: Path) -> dict[str, str]:
    like = {name: np.empty(x.shape, x.dtype) for name, x in checkpoint.param_shapes(checkpoints).items()}
    leaves = storage.flatten(checkpoint.load_params(checkpoints, storage.nest(like)))
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in leaves.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the names under which two runs' contents differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def place_of(directory: Path) -> str:
    """Returns what a run was doing when it was killed, by the files that it had written."""
    for phase in reversed(PHASES):
        if (directory / "eval" / f"{phase}.json").exists():
            following = PHASES[PHASES.index(phase) + 1 :]
            return f"before {following[0]}" if following else "report"
        if (directory / phase / "finished.json").exists():
            return f"evaluation of {phase}"
        if (directory / phase / "record.json").exists():
            steps = checkpoint.complete_steps(directory / phase / CHECKPOINTS)
            is_reference = phase == "tpo" and (directory / phase / "pairs" / "pairs.json").exists()
            first = ("reference" if is_reference else "pairs") if phase == "tpo" else "begin"
            return f"{phase} after {steps[-1]}" if steps else f"{phase}, {first}"
    return "statistics" if (directory / "data" / "demos" / "norm_stats.json").exists() else "demonstrations"


def wait_for(pid: int, seconds: float) -> int | None:
    """Returns the exit code of a process, minus its signal where one ended it; None where it works on."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def wait_for_changes(pid: int, directory: Path, number: int, seconds: float) -> tuple[int | None, int]:
    """Waits until a process has changed its run's files so often.

    Args:
        pid: the process.
        directory: the run's.
        number: changes to wait for, counted ten times a second; 0 returns at once.
        seconds: to wait at most.

    Returns:
        The exit code as of `wait_for`, and the number of changes.
    """
    deadline, count, before = time.monotonic() + seconds, 0, _files(directory)
    while count < number and time.monotonic() < deadline:
        if (code := wait_for(pid, 0.1)) is not None:
            return code, count
        after = _files(directory)
        count, before = count + (after != before), after
    return wait_for(pid, 0.0), count


def _files(directory: Path) -> set[tuple[str, int, int]]:
    """Returns names, sizes and times of a run's files, but of those that say only that a process has begun or lives."""
    found = set()
    for folder, folders, names in os.walk(directory):
        folders[:] = set(folders) - {"compiled", "tb"}
        for name in set(names) - {"lock", "config.json", HEARTBEAT_FILE}:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # gone since
                about = os.stat(path)
                found.add((path, about.st_size, about.st_mtime_ns))
    return found


class Whole(NamedTuple):
    """The run that nobody killed."""

    contents: dict[str, Any]
    """see `contents_of`"""
    num_changes: int
    """changes of its files, see `wait_for_changes`"""
    seconds: float
    """time that it took"""
    overhead: float = 0.0
    """the part of it that a process takes before it goes on with the work"""

    def draw(self, rng: random.Random, num_kills: int) -> tuple[int, float]:
        """Returns when to kill a process: the changes to wait for, and the seconds after them.

        One of five dies while it begins. The others die after at most `2 / num_kills` of all changes and within the
        time from one to the next, wherever the work is and however slow the machine.
        """
        if rng.random() < 0.2:
            return 0, rng.uniform(0.0, self.overhead)
        gap = (self.seconds - self.overhead) / max(1, self.num_changes)
        return rng.randint(1, max(1, 2 * self.num_changes // num_kills)), rng.uniform(0.0, gap)


def kill_runs(
    start: Callable[[Path, random.Random | None], int],
    base: Path,
    whole: Whole,
    *,
    num_kills: int,
    rng: random.Random,
    contents: Callable[[Path], dict[str, Any]] = contents_of,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Kills runs until there were enough kills, and lets the last one come to its end.

    Args:
        start: begins or goes on with the run of a directory in a process that leads a group of its own, and returns its
            number. It may let the run kill itself at a moment of its random numbers, but not where these are None.
        base: folder of the runs; a run that comes to its end before enough kills is followed by another.
        whole: the run that nobody killed.
        num_kills: number of kills.
        rng: of the moments.
        contents: see `contents_of`.
        report: is told of every kill, and of every end.
    """
    kills: list[Kill] = []
    different: list[str] = []
    number = 0
    while True:
        directory = base / str(number)
        begin, is_last = time.monotonic(), len(kills) >= num_kills
        pid = start(directory, None if is_last else rng)
        if is_last:
            code = wait_for(pid, 3600.0)
        else:
            num_changes, seconds = whole.draw(rng, num_kills)
            code, count = wait_for_changes(pid, directory, num_changes, 3600.0)
            if code is None and count < num_changes:
                os.killpg(pid, signal.SIGKILL)
                return Outcome(kills, [f"nothing was written for an hour at {place_of(directory)}"], different)
            code = wait_for(pid, seconds) if code is None else code
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            code = wait_for(pid, 60.0)
        if code == -signal.SIGKILL and not is_last:
            kills.append(Kill(time.monotonic() - begin, place_of(directory)))
            report(f"kill {len(kills)} of {num_kills} after {kills[-1].seconds:.1f} s: {kills[-1].place}")
            continue
        if code != 0:
            return Outcome(kills, [f"exit code {code} at {place_of(directory)}"], different)
        found = differing(whole.contents, contents(directory))
        report(f"run {number} came to its end; {', '.join(found) or 'nothing'} differs")
        different += found
        number += 1
        if is_last:
            return Outcome(kills, [], different)


def start_training(directory: Path, rng: random.Random | None) -> int:
    """Starts or goes on with the small run of PushCube from images."""
    del rng
    command = [sys.executable, "launch/train.py", "--config=configs/quickstart.py", f"--workdir={directory}", *SMALL]
    with (directory.with_suffix(".log")).open("ab") as log:
        files = [(os.POSIX_SPAWN_DUP2, log.fileno(), descriptor) for descriptor in (1, 2)]
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=files, setsid=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=home_path, required=True, help="a new folder for the runs")
    parser.add_argument("--json", type=home_path, help="file for the numbers")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    base = arguments.workdir.absolute()
    base.mkdir(parents=True)
    times: list[float] = []
    counts: list[int] = []
    for _ in range(2):  # the second time it is finished
        begin, pid = time.monotonic(), start_training(base / "whole", None)
        code, num_changes = wait_for_changes(pid, base / "whole", sys.maxsize, 36_000.0)
        if code != 0:
            print(f"error: the run that nobody killed ended with {code}, see {base / 'whole.log'}", file=sys.stderr)
            return 1
        times.append(time.monotonic() - begin)
        counts.append(num_changes)
    seconds, overhead = times[0], min(times)
    said = f"the run that nobody killed took {seconds:.0f} s, {overhead:.0f} of them to begin and to end"
    print(f"{said}, and changed its files {counts[0]} times", flush=True)
    try:
        outcome = kill_runs(
            start_training,
            base,
            Whole(contents_of(base / "whole"), counts[0], seconds, overhead),
            num_kills=arguments.kills,
            rng=random.Random(arguments.seed),
            report=lambda text: print(text, flush=True),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(outcome.kills)} kills, {len(outcome.lost)} lost, {len(outcome.different)} differing")
    if arguments.json is not None:
        command = f"python benchmarks/kill.py --kills={arguments.kills} --seed={arguments.seed}"
        numbers = {"command": command, "seconds": seconds, "overhead": overhead} | outcome._asdict()
        numbers["kills"] = [kill._asdict() for kill in outcome.kills]
        replace_text(arguments.json, json.dumps(numbers, indent=1) + "\n")
    for line in (*outcome.lost, *outcome.different):
        print(f"  {line}")
    if not (outcome.lost or outcome.different):
        shutil.rmtree(base)
    return 1 if outcome.lost or outcome.different else 0


if __name__ == "__main__":
    sys.exit(main())
