"""Contexts that are kept: an iteration of PPO is the same, and reads images and prompts once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flow_policy import flow_policy
from nano_policy import jit
from toy_task import NUM_ENVS, fresh

from stare_jax.envs import toy
from stare_jax.models import PI05_PALIGEMMA
from stare_jax.sharding.mesh import path_name
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.train.ppo import PPOConfig, train_ppo

# Large eps: the moments are those of SGD, and a difference in rounding stays one.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, eps=1.0)
SETTINGS = {"num_iterations": 2, "num_episodes": 12, "num_epochs": 2, "minibatch_size": 32, "microbatch_size": 16}
FROZEN = (PI05_PALIGEMMA, "^state_embed/")


@functools.cache
def frozen_policy():
    policy = flow_policy(noise="learned", frozen_patterns=FROZEN)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return policy, jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(s.dtype), shapes)


def test_an_iteration_with_contexts_moves_the_parameters_as_one_without(spec, make_run, monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)  # all programs alike
    policy, params = frozen_policy()
    results = []
    for context_gb in (0, 1):
        run = make_run(f"{context_gb}")
        config = PPOConfig(**SETTINGS, context_gb=context_gb, kl_coef=0.1, rescore=True, optimizer=OPTIMIZER)
        results.append(train_ppo(policy, fresh(params), toy.ToyPush(NUM_ENVS), spec, config, run))
        assert sum(run.writer.column("perf/compilations")[1:]) == 0
        np.testing.assert_allclose(run.writer.column("ppo/first_log_ratio_rms"), 0, atol=1e-4)
    without, with_ = results
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), with_, without)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), without, params)
    names = {path_name(path) for path, change in jax.tree.leaves_with_path(moved) if change > 1e-3}
    assert any("_1/" in name for name in names) and any(name.startswith("value_head") for name in names)
