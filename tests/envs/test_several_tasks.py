"""Simulators of several tasks: their configuration, and a pool whose rows are those of pools of their own."""

import contextlib

import jax
import numpy as np
import pytest

from stare_jax.config import from_dict, to_dict
from stare_jax.envs import EnvConfig, make_expert, make_vec_env
from stare_jax.envs.maniskill import batched
from stare_jax.envs.maniskill.batched import resolve_backend
from stare_jax.stages import TASKS, get_task

TWO = ("PushCube-v1", "PullCube-v1")
FRANKA = (*TWO, "StackCube-v1", "LiftPegUpright-v1")
WIDOWX = tuple(task for task in TASKS if task not in FRANKA)


@pytest.mark.parametrize("tasks", [FRANKA, WIDOWX])
def test_processes_are_dealt_out_to_the_tasks_in_turn(tasks):
    config = EnvConfig(tasks=tasks, num_workers=6, envs_per_worker=2)
    assert config.task_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    assert config.env_id == "+".join(tasks) == config.info.env_id
    assert config.specs == tuple(map(get_task, tasks))
    assert config.horizon == EnvConfig(tasks[0]).horizon
    assert config.of_task(2) == EnvConfig(tasks[2], num_workers=6, envs_per_worker=2)
    assert from_dict(EnvConfig, to_dict(config)) == config


def test_one_of_several_is_the_one():
    assert EnvConfig(tasks=("StackCube-v1",)) == EnvConfig("StackCube-v1") == EnvConfig(task="StackCube-v1")
    old = to_dict(EnvConfig("StackCube-v1"))
    del old["tasks"]  # a configuration from before there were several
    assert from_dict(EnvConfig, old) == EnvConfig("StackCube-v1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tasks": ("PushCube-v1", WIDOWX[0])},
            "tasks: robot: got panda of Push.* of Put.*, expected the same",
        ),
        ({"tasks": ("PushCube-v1",) * 2}, "tasks: got .*, expected tasks with different instructions, each once"),
        ({"tasks": FRANKA, "num_workers": 3}, "num_workers: got 3, expected at least 4, one process for each of Push"),
        (
            {"tasks": TWO, "num_workers": 2, "num_groups": 2},
            "num_groups: got 2, expected a divisor of num_workers = 2, with one process of each task or more in every",
        ),
        (
            {"tasks": TWO, "env_id": "StackCube-v1"},
            "env_id: got 'StackCube-v1' beside tasks .*, expected '' or no tasks",
        ),
        ({"tasks": TWO, "task": "x.py"}, "task: got 'x.py' beside tasks .*, expected one of the two"),
        ({"tasks": TWO[:1], "task": "x.py"}, "task: got 'x.py' beside tasks .*, expected one of the two"),
        ({"tasks": (*TWO, "Nothing-v1")}, "task: got 'Nothing-v1', expected one of"),
        (
            {"tasks": TWO, "backend": "cuda", "num_workers": 1},
            "backend: got 'cuda' for .*: a batch on a GPU is of",
        ),
    ],
)
def test_tasks_that_do_not_fit_one_policy_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**fields)


def test_several_tasks_run_in_processes_also_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(batched, "missing_for_cuda", lambda config: None)
    said = []
    assert resolve_backend(EnvConfig(tasks=TWO, backend="auto"), said.append).backend == "cpu"
    assert "a batch on a GPU is of one task" in said[0]


def test_rows_are_those_of_simulators_of_one_task():
    settings = {"envs_per_worker": 1, "image_size": 0, "use_state": "low_dim"}
    experts = [make_expert(task) for task in TWO]
    seeds = [[3, 4], [5, 6]]

    def act(signals, row, expert):
        return expert.act(jax.tree.map(lambda leaf: leaf[row], signals), expert.init())[0]

    with contextlib.ExitStack() as stack:
        both, *alone = (
            stack.enter_context(contextlib.closing(make_vec_env(config)))
            for config in (
                EnvConfig(tasks=TWO, num_workers=2, **settings),
                *(EnvConfig(task, num_workers=1, **settings) for task in TWO),
            )
        )
        assert both.instructions == [get_task(task).instruction for task in TWO]
        for round_seeds in seeds:
            state = both.reset(round_seeds, reproducible=True)
            others = [env.reset([seed], reproducible=True) for env, seed in zip(alone, round_seeds, strict=True)]
            for t in range(6):
                for k, other in enumerate(others):
                    got = jax.tree.map(lambda leaf, k=k: leaf[k], (state.observation, state.signals))
                    expected = jax.tree.map(lambda leaf: leaf[0], (other.observation, other.signals))
                    jax.tree.map(np.testing.assert_array_equal, got, expected)
                actions = np.stack([act(state.signals, k, expert) for k, expert in enumerate(experts)])
                if t == 4:  # the second alone begins again
                    state = both.step(actions, {1: 77})
                    others = [alone[0].step(actions[:1]), alone[1].step(actions[1:], {0: 77})]
                else:
                    state = both.step(actions)
                    others = [env.step(actions[k : k + 1]) for k, env in enumerate(alone)]
