"""Run by test_killed_runs.py as a process of its own: kills runs of the toy, all phases, and says what became of them.

    python tests/runs/killed_toy.py FOLDER KILLS SEED

Every run is a process, forked from this one before JAX has a device, so that nothing is imported twice.
"""

import dataclasses
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "benchmarks"), *(str(TESTS / room) for room in ("runs", "train"))]

import kill  # noqa: E402
import pytest  # noqa: E402
import toy_run  # noqa: E402

from stare_jax.logging import LoggingConfig  # noqa: E402
from stare_jax.runs import ipi  # noqa: E402

for _name in (
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "jax.experimental.compilation_cache"),
    *("grain", "orbax.checkpoint"),
):
    importlib.import_module(_name)

WRITING = ("open", "os.", "shutil.")
"""beginnings of Python's names for what a process does to files."""


def make_config():
    """All phases, in parts: rounds of data, steps between checkpoints, parts of evaluations."""
    config = toy_run.make_config(logging=LoggingConfig(tensorboard=False))
    return dataclasses.replace(
        config,
        demos=dataclasses.replace(config.demos, write_every=2),
        sft=dataclasses.replace(config.sft, num_steps=5),
        pairs=dataclasses.replace(config.pairs, write_every=1),
        tpo=dataclasses.replace(config.tpo, num_epochs=3, checkpoint_every=2),
        ppo=dataclasses.replace(config.ppo, num_iterations=3, checkpoint_every=2),
        evaluation=dataclasses.replace(config.evaluation, num_episodes=8),
    )


def fork(work):
    """Runs work() in a process of its own, which leads its group; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_events(directory, at):
    """Counts what the process does to a run's files from now on, and kills it at one of them; returns the count."""
    counted = [0]

    def hook(event, arguments):
        if event.startswith(WRITING) and str(arguments[0]).startswith(str(directory)):
            counted[0] += 1
            if counted[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def set_clock(seconds):
    """Lets the clock on the wall jump; the one that measures time goes on."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + 10**9 * seconds


def train(directory, at=0, jump=0):
    """Runs all phases, or goes on with them; returns how often the run's files were touched."""
    set_clock(jump)
    with pytest.MonkeyPatch.context() as patch:
        toy_run.replace_simulator(patch)
        patch.setattr(ipi, "plan_run", lambda *arguments: None)  # takes seconds, and writes nothing
        counted = count_events(directory, at)
        ipi.run_ipi(make_config(), directory)
    return counted[0]


def contents(directory):
    """Returns `kill.contents_of`, read by a process of its own."""
    file = directory.with_suffix(".json")
    pid = fork(lambda: file.write_text(json.dumps(kill.contents_of(directory))))
    assert kill.wait_for(pid, 600.0) == 0
    return json.loads(file.read_text())


def main(base, num_kills, seed):
    begin, count = time.monotonic(), base / "count"
    pid = fork(lambda: count.write_text(str(train(base / "whole"))))
    code, num_changes = kill.wait_for_changes(pid, base / "whole", sys.maxsize, 1800.0)
    assert code == 0
    seconds, num_events = time.monotonic() - begin, int(count.read_text())

    def start(directory, rng):
        # Every second one is killed at a moment of its work on files.
        if rng is None:
            return fork(lambda: train(directory))
        at = rng.randrange(1, 1 + 2 * num_events // num_kills) if rng.random() < 0.5 else 0
        return fork(lambda: train(directory, at, jump=rng.choice((0, -86_400, 86_400))))

    whole = kill.Whole(contents(base / "whole"), num_changes, seconds, overhead=seconds / 20)
    again = kill.differing(whole.contents, contents(base / "whole"))
    outcome = kill.kill_runs(start, base, whole, num_kills=num_kills, rng=random.Random(seed), contents=contents)
    (base / "outcome.json").write_text(
        json.dumps({**outcome._asdict(), "names": sorted(whole.contents), "again": again, "num_events": num_events})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
