"""Contexts that are kept: iterations of PPO are the same, and read images and prompts once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_policy import flow_policy
from nano_policy import jit
from toy_task import NUM_ENVS, fresh

from stare_jax.envs import toy
from stare_jax.models import PI05_PALIGEMMA
from stare_jax.sharding.mesh import path_name
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.state.storage import num_bytes
from stare_jax.train.ppo import PPOConfig, kept_contexts, train_ppo

# Large eps: steps are those of SGD, and a difference in rounding stays one.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, eps=1.0)
CONFIG = PPOConfig(
    num_iterations=2, num_episodes=6, num_epochs=2, minibatch_size=32, microbatch_size=16, optimizer=OPTIMIZER
)


@functools.cache
def frozen_policy():
    policy = flow_policy(noise="learned", frozen_patterns=(PI05_PALIGEMMA, "^state_embed/"))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return policy, jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(s.dtype), shapes)


@pytest.mark.parametrize("rescore", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_iterations_with_contexts_move_the_parameters_as_those_without(spec, make_run, monkeypatch, rescore):
    monkeypatch.setattr(jax, "jit", jit)  # all programs alike
    policy, params = frozen_policy()
    results = []
    for changes in ({}, {"context_gb": 1.0, "rescore": rescore}):
        run, config = make_run(f"run{len(results)}"), dataclasses.replace(CONFIG, **changes)
        results.append(train_ppo(policy, fresh(params), toy.ToyPush(NUM_ENVS), spec, config, run))
        assert sum(run.writer.column("perf/compilations")[1:]) == 0
        np.testing.assert_allclose(run.writer.column("ppo/first_log_ratio_rms"), 0, atol=1e-3)
    without, kept = results
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), kept, without)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), without, params)
    names = {path_name(path) for path, change in jax.tree.leaves_with_path(moved) if change > 1e-4}
    assert any("_1/" in name for name in names) and any(name.startswith("value_head") for name in names)


def test_contexts_that_cannot_be_kept_are_not_and_a_line_says_so(policy, capsys):
    flow, horizon = frozen_policy()[0], 30
    size = 6 * 15  # decisions, of two actions each
    shapes = kept_contexts(flow, dataclasses.replace(CONFIG, context_gb=1.0), horizon)
    assert {len(leaf) for leaf in jax.tree.leaves(shapes)} == {96}  # whole microbatches
    # Keys and values of 12 tokens, 1 head of 16, in one layer; 12 flags; 32 pooled numbers.
    assert num_bytes(shapes) == 96 * (2 * 12 * 16 * 4 + 12 + 32 * 4)
    assert kept_contexts(flow, dataclasses.replace(CONFIG, context_gb=0.0), horizon) is None
    assert capsys.readouterr().out == ""
    assert kept_contexts(flow, dataclasses.replace(CONFIG, context_gb=1e-4), horizon) is None
    expected = (
        f"ppo.context_gb: got 0.0001, expected 0.000161 for {size} decisions; contexts are computed in every epoch"
    )
    assert expected in capsys.readouterr().out
    assert kept_contexts(policy, dataclasses.replace(CONFIG, context_gb=1.0), horizon) is None
    assert "ppo.context_gb = 1 is not used: this policy has no context" in capsys.readouterr().out
