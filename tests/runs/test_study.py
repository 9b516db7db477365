"""Plans of studies: which runs there are, what each begins with, and mistakes that are named before anything runs."""

import dataclasses
from typing import NamedTuple

import pytest

from stare_jax.config import ConfigError
from stare_jax.runs.study import Study, Variant, plan_study, select_jobs


class Step(NamedTuple):
    phase: str
    start: str


METHODS = {
    "sft": Step("sft", ""),
    "tpo": Step("tpo", "sft"),
    "ppo": Step("ppo", "sft"),
    "dense": Step("ppo", "sft"),
    "ipi": Step("ppo", "tpo"),
}
STUDY = Study("configs/x.py:{task},{method}", methods=("ppo", "ipi"), tasks=("Push", "Pull"), seeds=(0, 3))


def plan(**changes):
    return plan_study(dataclasses.replace(STUDY, **changes), METHODS, "runs/x")


def names(jobs):
    return [job.name for job in jobs]


def flags(jobs, name):
    """Flag -> value of a job, the last of each."""
    (job,) = [job for job in jobs if job.name == name]
    return dict(word.removeprefix("--").partition("=")[::2] for word in job.arguments)


def test_what_methods_share_is_there_once_and_before_them():
    one = ["demos", "sft/seed_0", "ppo/seed_0", "tpo/seed_0", "ipi/seed_0"]
    other = ["sft/seed_3", "ppo/seed_3", "tpo/seed_3", "ipi/seed_3"]
    expected = [f"{task}/{name}" for part in (one, other) for task in ("Push", "Pull") for name in part]
    jobs = plan()
    assert names(jobs) == expected  # all methods of a seed before the next seed
    seen = set()
    for job in jobs:
        assert set(job.after) <= seen, job.name
        seen.add(job.name)
    assert {job.name: job.after for job in jobs if job.after}["Push/ipi/seed_3"] == ("Push/tpo/seed_3",)
    assert [job.phase for job in jobs[:5]] == ["demos", "sft", "ppo", "tpo", "ppo"]
    assert jobs[4].kind == "Push/ipi"


def test_a_run_begins_with_the_weights_and_the_demonstrations_of_the_runs_before_it():
    jobs = plan()
    demos = flags(jobs, "Pull/demos")
    assert demos == {
        "demos_only": "",
        "config": "configs/x.py:Pull,sft",
        "config.phases": "sft",
        "config.seed": "0",
        "workdir": "runs/x/Pull/demos",
    }
    imitation = flags(jobs, "Pull/sft/seed_3")
    assert imitation["config.demos_from"] == "runs/x/Pull/demos/data/demos"
    assert (imitation["config.phases"], imitation["config.seed"]) == ("sft", "3")
    assert flags(jobs, "Pull/ppo/seed_3") == {
        "config": "configs/x.py:Pull,ppo",
        "config.phases": "ppo",
        "config.seed": "3",
        "config.init_from": "runs/x/Pull/sft/seed_3/sft",
        "workdir": "runs/x/Pull/ppo/seed_3",
    }
    assert flags(jobs, "Pull/ipi/seed_3")["config.init_from"] == "runs/x/Pull/tpo/seed_3/tpo"


def test_changes_are_those_of_all_runs_of_a_task_and_of_a_variant():
    jobs = plan(
        methods=("ppo", "short"),
        changes={"ppo.gamma": 0.9, "demos.num_demos": 10},
        task_changes={"Pull": {"demos.num_demos": 20}},
        variants={"short": Variant("ppo", {"ppo.gamma": 0.5, "stages.enabled": (True, False)})},
    )
    got = {name: flags(jobs, name) for name in names(jobs)}
    assert {name: each["config.demos.num_demos"] for name, each in got.items() if "seed_0" in name} == {
        f"{task}/{method}/seed_0": number
        for task, number in (("Push", "10"), ("Pull", "20"))
        for method in ("sft", "ppo", "short")
    }
    short, plain = got["Push/short/seed_0"], got["Push/ppo/seed_0"]
    different = {"workdir", "config.ppo.gamma", "config.stages.enabled"}
    assert {name for name in short if short[name] != plain.get(name)} == different
    assert (short["config.ppo.gamma"], plain["config.ppo.gamma"]) == ("0.5", "0.9")
    assert short["config"] == plain["config"] == "configs/x.py:Push,ppo"


def test_seeds_of_tasks_and_pairs_that_are_left_out():
    jobs = plan(methods=("ppo", "dense"), seeds={"Push": (0, 1), "Pull": (7,)}, without=(("Push", "dense"),))
    expected = ["Push/ppo/seed_0", "Push/ppo/seed_1", "Pull/ppo/seed_7", "Pull/dense/seed_7"]
    assert {name for name in names(jobs) if "/sft/" not in name and "demos" not in name} == set(expected)


def test_demonstrations_that_are_given_are_not_collected():
    jobs = plan(changes={"demos_from": "data/push"})
    assert not [name for name in names(jobs) if name.endswith("demos")]
    assert flags(jobs, "Push/sft/seed_0")["config.demos_from"] == "data/push"


def test_a_task_may_have_a_configuration_of_its_own():
    jobs = plan(config={"Push": "configs/x.py:{task},{method}", "Pull": "configs/y.py:{method}"})
    assert flags(jobs, "Push/ppo/seed_0")["config"] == "configs/x.py:Push,ppo"
    assert flags(jobs, "Pull/demos")["config"] == "configs/y.py:sft"


def test_weights_that_are_given_are_those_that_imitations_start_from():
    jobs = plan(init_from="weights/7b")
    starts = {name: flags(jobs, name).get("config.init_from") for name in names(jobs) if name.startswith("Push/")}
    assert starts["Push/sft/seed_0"] == starts["Push/sft/seed_3"] == "weights/7b"
    assert starts["Push/ppo/seed_3"] == "runs/x/Push/sft/seed_3/sft" and starts["Push/demos"] is None


def test_further_arguments_are_those_of_every_run():
    jobs = plan_study(STUDY, METHODS, "runs/x", more=("--config.ppo.gamma=0.7",))
    assert all("--config.ppo.gamma=0.7" in job.arguments for job in jobs)


def test_some_runs_with_all_that_they_begin_with():
    chosen = select_jobs(plan(), {"Pull/ipi/seed_3"})
    assert names(chosen) == ["Pull/demos", "Pull/sft/seed_3", "Pull/tpo/seed_3", "Pull/ipi/seed_3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("ppo", "grpo")}, "methods: got grpo, expected some of sft, tpo, ppo, dense, ipi"),
        ({"methods": ("ppo", "ppo")}, "methods: got .*, expected at least one, each once"),
        ({"methods": ()}, "methods: got .*, expected at least one, each once"),
        ({"tasks": ("a/b",)}, "tasks: got 'a/b', expected letters, digits"),
        ({"methods": ("..",)}, "methods: got '..', expected letters, digits"),
        ({"methods": (3,)}, r"methods\[0\]: got 3, expected str"),
        ({"seeds": 3}, "seeds of all tasks: got 3, expected a sequence"),
        ({"seeds": {"Push": (0,), "Pull": 1}}, "seeds of Pull: got 1, expected a sequence"),
        ({"changes": 3}, "changes: got 3, expected Mapping"),
        ({"variants": {"x": "ppo"}}, "variants.x: got 'ppo', expected Variant"),
        ({"config": "x.py:{taks}"}, "config: got 'x.py:{taks}', expected no braces but {task} and {method}"),
        ({"seeds": (1, 1)}, "seeds of Push: got .*, expected at least one, each once"),
        ({"seeds": {"Push": (1,)}}, "seeds: got those of Push, expected those of Push, Pull"),
        ({"config": {"Push": "x"}}, "config: got those of Push, expected those of Push, Pull"),
        (
            {"config": {"Push": "x", "Pull": "{x}"}},
            "config.Pull: got '{x}', expected no braces but {task} and {method}",
        ),
        ({"config": {"Push": "x", "Pull": 3}}, "config.Pull: got 3, expected str"),
        ({"init_from": 3}, "init_from: got 3, expected str"),
        ({"task_changes": {"Lift": {}}}, "task_changes: got Lift, expected some of Push, Pull"),
        ({"without": (("Push", "dense"),)}, "without: got dense, expected some of ppo, ipi"),
        ({"variants": {"ppo": Variant("dense", {})}}, "variants: got ppo, expected names that no method has"),
        ({"variants": {"x": Variant("grpo", {})}}, "variants: got grpo, expected some of sft"),
        (
            {"variants": {"x": Variant("ppo", {"sft.num_steps": 3})}},
            "variants: x: got sft.num_steps, expected fields of ppo, stages",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)
