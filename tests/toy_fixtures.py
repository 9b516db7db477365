"""A toy task, a small policy and runs of it, shared by the tests of the training loops."""

import jax
import pytest
from toy_task import Writer

from stare_jax.envs import toy
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.train.loop import Run


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, **fields of Run) -> Run with a `Writer`; the same name is the same directory."""

    def make(name="run", **fields):
        return Run(tmp_path / name, toy.norm_stats(), **({"writer": Writer()} | fields))

    return make


@pytest.fixture(scope="session")
def policy():
    return make_mlp(MLPConfig(hidden_dims=(16,), value_dims=(16,), label_width=0.5), toy.norm_stats())


@pytest.fixture(scope="session")
def params(policy):
    return jax.jit(policy.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def spec():
    return toy.task_spec()
