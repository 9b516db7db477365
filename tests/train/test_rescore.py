"""Ratios before the first update: in bfloat16 they are 1 only where acting and learning round alike."""

import jax
import numpy as np
import pytest
from nano_policy import jit, random_observation, some_stats
from toy_task import NUM_ENVS, fresh

from stare_jax.envs import toy
from stare_jax.models import make_policy, openvla_state, pi05_state
from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.sharding.mesh import make_mesh, path_name
from stare_jax.state.optimizer import frozen_params, make_optimizer
from stare_jax.state.train_state import create_state
from stare_jax.targets import Targets
from stare_jax.train.ppo import PPOConfig, make_ppo_step, train_ppo
from stare_jax.train.ppo_batch import PPOBatch, make_rescore, minibatches
from stare_jax.types import Decisions

NUM_ROWS, LAYERS, WIDTH = 32, 18, 64
CONFIG = PPOConfig(minibatch_size=NUM_ROWS, microbatch_size=8)
EXECUTION = Execution(dtype="bfloat16")


def deep_policy(kind):
    """Either model with pi0.5's number of layers at a fraction of its width."""
    if kind == "openvla":
        llm = LlamaConfig(vocab_size=896, width=WIDTH, depth=LAYERS, num_heads=4, num_kv_heads=4, mlp_dim=2 * WIDTH)
        config = openvla_state(3, llm=llm, execution=EXECUTION, decode_unroll=1)
    else:
        heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
        experts = {
            "paligemma": GemmaConfig(width=WIDTH, depth=LAYERS, mlp_dim=2 * WIDTH, **heads),
            "expert": GemmaConfig(width=WIDTH // 2, depth=LAYERS, mlp_dim=WIDTH, **heads),
        }
        config = pi05_state(3, noise=kind, num_denoising_steps=4, window=8, chunk=5, execution=EXECUTION, **experts)
    return make_policy(config, some_stats(config.action_dim, config.state_dim))


def random_params(policy, kind):
    """Numbers of the size of fresh ones, also where fresh ones are zeros, which would hide the expert."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        name = path_name(path)
        if name.endswith(("bias", "scale", "embedding")):
            start = 1.0 if kind == "openvla" and name.endswith("scale") else 0.0
            return (start + rng.normal(0, 0.02, leaf.shape)).astype(leaf.dtype)
        axis = -3 if name.endswith(("query/kernel", "key/kernel", "value/kernel")) else -2
        return rng.normal(0, leaf.shape[axis] ** -0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(one, jax.eval_shape(policy.init, jax.random.key(0)))


def sampled_batch(policy, params):
    """Decisions of one batch of states, as episodes of one decision each."""
    observation = random_observation(policy, ("push the blue cube to the target",) * NUM_ROWS)
    decision = jax.device_get(jit(policy.sample)(params, observation, jax.random.key(1)))
    seen, trace, logp = jax.tree.map(lambda x: x[:, None], (observation, decision.trace, decision.logp))
    zeros, is_valid = np.zeros((NUM_ROWS, 1), np.float32), np.ones((NUM_ROWS, 1), bool)
    decisions = Decisions(trace, logp, np.zeros((NUM_ROWS, 2), np.float32), is_valid)
    return PPOBatch(seen, decisions, Targets(**dict.fromkeys(Targets._fields, zeros)), zeros + 1, np.float32(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvla", "learned", "sde"])
def test_in_bfloat16_decisions_that_are_scored_again_have_a_ratio_of_one(kind, monkeypatch):
    """Scored in microbatches of the update's size, whichever rows are in them; most of the rollout are too far off."""
    monkeypatch.setattr(jax, "jit", jit)  # all programs alike
    policy = deep_policy(kind)
    params = random_params(policy, kind)
    assert policy.compute_dtype == "bfloat16"
    batch = sampled_batch(policy, params)
    tx = make_optimizer(CONFIG.optimizer, num_steps=None)
    layout = {"mesh": make_mesh(), "rules": policy.sharding_rules, "freeze": frozen_params(policy, CONFIG.optimizer)}
    step, state = jit(make_ppo_step(policy, tx, CONFIG)), create_state(params, tx, **layout)

    def first(batch):
        (minibatch,) = minibatches(batch, size=NUM_ROWS, rng=np.random.default_rng(0))
        _, metrics = step(state, minibatch, True, 0.0)
        return {name: float(metrics[f"ppo/{name}"]) for name in ("log_ratio_square", "ratio_min", "ratio_max")}

    rescore = make_rescore(policy, CONFIG.temperature, NUM_ROWS, CONFIG.microbatch_size)
    before, after = first(batch), first(rescore(state.params, batch, make_mesh()))
    # Steps of an SDE have so much noise that a rounded mean moves their scores little.
    assert (before["log_ratio_square"] ** 0.5 > 0.02) == (kind != "sde")
    assert after["log_ratio_square"] ** 0.5 <= 0.02 and after["ratio_min"] >= 0.8 and after["ratio_max"] <= 1.2


@pytest.mark.parametrize(
    ("compute_dtype", "rescore", "is_rescored"),
    [("bfloat16", None, True), ("float32", None, False), ("float32", True, True)],
)
def test_decisions_are_scored_again_where_the_network_rounds(
    policy, params, spec, make_run, capsys, compute_dtype, rescore, is_rescored
):
    """A policy whose rollouts are 0.1 nats a number off: PPO begins with other ratios, or sees none of it."""

    def sample(*inputs, **settings):
        decision = policy.sample(*inputs, **settings)
        return decision._replace(logp=decision.logp + 0.1)

    rounded, run = policy._replace(sample=sample, compute_dtype=compute_dtype), make_run()
    config = PPOConfig(num_iterations=2, num_episodes=16, minibatch_size=256, rescore=rescore)
    train_ppo(rounded, fresh(params), toy.ToyPush(NUM_ENVS), spec, config, run)
    found, said = run.writer.column("ppo/first_log_ratio_rms"), capsys.readouterr().out
    assert found == pytest.approx([0.0 if is_rescored else 0.2] * 2, abs=1e-4)
    assert said.count("ppo: warning: log-ratios of the first minibatch have a root") == (0 if is_rescored else 1)
    assert sum(run.writer.column("perf/compilations")[1:]) == 0
