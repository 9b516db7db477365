"""Every command of the pages that is not marked with what it needs is run, as it stands, by a process of its own.

    python -m pytest -m slow tests/docs/test_commands_run.py      an hour of one core

Commands follow each other as on the pages, README first, in one copy of the repository, so that what one has made is
there for the next. A reader's own weights, recordings and runs are small ones in the real formats (`given.py`); words
behind a command make it small (`running.py`). Success is the documented exit code, and no traceback.
"""

import sys

import pytest
from given import MAKERS
from running import SERVER, Workplace, lines, spelled

NOT_RUN = {
    "make setup": "it would change the environment of the tests; CI begins with it",
    "pip install transformers==4.40.1 tokenizers==0.19.1 timm==0.9.10 'numpy<2' torch peft==0.11.1": (
        "an environment of its own, and a network; tests/weights/test_openvla_original.py makes one"
    ),
    "python launch/plan.py --config=configs/ipi_widowx.py --run-once": (
        "17 GB and twenty minutes; tests/plan/test_plan_once.py makes a small model's decision"
    ),
    "python launch/plan.py --config=configs/ipi_maniskill.py --topology=v5e:2x4 --config.mesh.fsdp=8": (
        "libtpu, which is not in the environment; tests/plan/test_plan_command.py has what is said without it"
    ),
    "python benchmarks/kill.py --kills=50 --workdir=/tmp/kills --json=kills.json": (
        "ten minutes, even with one kill; tests/runs/test_killed_runs.py kills runs of a toy by the same functions"
    ),
}
"""Command -> why it is not run, and what is instead."""
EXIT_CODES = {
    "python launch/plan.py --config=configs/quickstart.py --devices=2x0.1GB": 1,
    "python launch/plan.py --config=configs/quickstart.py --devices=2x0.1GB --programs=sample,ppo": 1,
}
"""Command -> its documented exit code, where it is not 0: a plan says that something does not fit."""
CHEAP = ("make lint", "python launch/train.py --help", "source .venv/bin/activate")
STOPPED = 130
"""Exit code after Ctrl-C."""

LINES = [line for line in lines() if str(line) not in NOT_RUN]


@pytest.fixture(scope="module")
def workplace():
    place = Workplace()
    yield place
    place.remove()


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=str(line), marks=() if str(line) in CHEAP else pytest.mark.slow) for line in LINES]
)
def test_a_command_runs(line, workplace):
    for words in filter(None, (line.server, line.words)):
        text = " ".join(spelled(words))
        for name in MAKERS:
            if name.replace("home/", "~/") in text:
                workplace.give(name)
    code = EXIT_CODES.get(str(line), 0)
    if SERVER in line.words:
        with workplace.serving(spelled(line.words), STOPPED):
            return
    if line.server:
        with workplace.serving(spelled(line.server), STOPPED) as address:
            workplace.run(spelled(line.words, [f"--policy={address}"]), code)
    elif any(word.startswith("--policy=http://") for word in line.words):
        with workplace.serving([sys.executable, "tests/docs/given.py", "openvla_server"], 0) as address:
            workplace.run(spelled(line.words, [f"--policy={address}"]), code)
    else:
        workplace.run(spelled(line.words), code)


def test_what_is_not_run_is_a_command_of_a_page():
    texts = [str(line) for line in lines()]
    assert len(texts) == len(LINES) + len(NOT_RUN) > 80
    assert {*NOT_RUN, *EXIT_CODES, *CHEAP} <= {*texts}
    assert not set(NOT_RUN) & {*EXIT_CODES, *CHEAP}
