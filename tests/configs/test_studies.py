"""Studies: every run of them is a valid configuration, and methods differ in nothing but what makes them methods."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import study as command

from stare_jax.config import to_dict
from stare_jax.report.study_runs import StudyRun
from stare_jax.report.study_stages import Toggles, find_toggles
from stare_jax.runs.directory import differences
from stare_jax.runs.jobs import Queue
from stare_jax.runs.study import plan_study

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.stem for path in (ROOT / "configs" / "studies").glob("*.py"))
PLACES = {"config.phases", "config.init_from", "config.demos_from"}
"""fields in which runs of one task and seed differ because they begin from one another"""


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def test_there_are_studies():
    assert "franka_state" in STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_printed_commands_of_a_study_are_valid_and_have_the_same_numbers(name, tmp_path, capsys):
    methods = importlib.import_module("configs.methods").METHODS
    study = command.load_study(ROOT / "configs" / "studies" / f"{name}.py")
    planned = plan_study(study, methods, "runs/x")
    assert len({job.name for job in planned}) == len(planned)
    command.print_commands(Queue(planned, tmp_path, [sys.executable, str(command.TRAIN)], [[0]]))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert {tuple(words[:2]) for words in lines} == {("python", "launch/train.py")}
    jobs = [job._replace(arguments=tuple(words[2:])) for job, words in zip(planned, lines, strict=True)]
    assert jobs == list(planned)  # so nothing is lost in the shell
    for task in study.tasks:
        seed = study.seeds_of(task)[0]
        configs = {
            job.name.split("/")[1]: command.read_config(job)
            for job in jobs
            if job.name.startswith(f"{task}/") and job.name.endswith(f"seed_{seed}")
        }
        wanted = {method for method in study.methods if (task, method) not in study.without}
        assert wanted | {"sft"} <= set(configs)
        for method, config in configs.items():
            variant = study.variants.get(method)
            step = methods[variant.method if variant else method]
            own = {f"config.{field}" for each in methods.values() for field in each.changes}
            own |= {f"config.{field}" for field in (variant.changes if variant else ())}
            changes = differences(to_dict(configs["sft"]), to_dict(config), "config")
            assert {change.path for change in changes} <= own | PLACES, method
            assert config.phases == (step.phase,) and config.seed == seed


def test_toggles_are_found_among_the_runs_of_their_study_by_what_they_turn_off():
    """By configurations as runs keep them; PPO, which has no signal at all, is not the one with all signals."""
    study = command.load_study(ROOT / "configs" / "studies" / "franka_toggles.py")
    jobs = plan_study(study, importlib.import_module("configs.methods").METHODS, "runs/x")
    runs = []
    for job in jobs:
        if job.name.startswith("StackCube-v1/") and job.name.endswith(("seed_0", "seed_1")):
            task, method, seed = job.name.split("/")
            config = json.loads(json.dumps(to_dict(command.read_config(job))))
            runs.append(StudyRun(task, method, seed.removeprefix("seed_"), Path(job.name), config, result=...))
    expected = Toggles("sta_ppo", {stage: f"without_{stage + 1}" for stage in range(4)})
    assert find_toggles(runs, "StackCube-v1") == find_toggles(runs[::-1], "StackCube-v1") == expected
