"""The phases with a policy that decides on chunks by a flow: losses at the start, microbatches, averages."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flow_policy import flow_policy, prompted
from toy_task import NUM_ENVS, demo_batches, demo_windows, fresh, random_pairs

from stare_jax.data.schema import DatasetError
from stare_jax.envs import toy
from stare_jax.logging import Interrupted
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, make_optimizer
from stare_jax.state.train_state import copy_trainable, create_state
from stare_jax.train.ppo import PPOConfig, make_ppo_step, make_prepare
from stare_jax.train.ppo_batch import minibatches
from stare_jax.train.sft import SFTBatch, SFTConfig, make_sft_step, train_sft
from stare_jax.train.tpo import TPOConfig, make_tpo_step
from stare_jax.train.tpo_reference import PairBatch, score_pairs

OPTIMIZER = OptimizerConfig(1e-3, freeze=("^value",))
NOISES = {
    "sde": {"noise": "sde"},
    "learned": {"noise": "learned"},
    "chain": {"noise": "learned", "preference": "chain"},
}


@functools.cache
def policy_and_params(kind="sde") -> tuple[Policy, dict]:
    policy = flow_policy(**NOISES[kind])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return policy, jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(s.dtype), shapes)


@functools.cache
def pairs(kind):
    return random_pairs(*policy_and_params(kind), 3)


@functools.cache
def compiled_step(make_step, kind, config):
    policy, _ = policy_and_params(kind)
    tx = make_optimizer(config.optimizer, num_steps=None)
    return tx, jax.jit(make_step(policy, tx, config))


def take_step(make_step, kind, config, *inputs):
    policy, params = policy_and_params(kind)
    tx, step = compiled_step(make_step, kind, config)
    layout = {"mesh": make_mesh(), "rules": policy.sharding_rules, "freeze": frozen_params(policy, config.optimizer)}
    return step(create_state(params, tx, **layout), *inputs)


def assert_close(tree, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sde", "learned"])
def test_a_ratio_of_one_and_no_divergence_at_the_start(kind):
    policy, params = policy_and_params(kind)
    act = policy_act(policy, params, jax.random.key(3))
    rollout = collect_episodes(toy.ToyPush(NUM_ENVS), act, np.arange(4), stop_at_success=True)
    config = PPOConfig(minibatch_size=64, kl_coef=0.5, optimizer=OPTIMIZER)
    batch = make_prepare(toy.task_spec(), config, chunk=policy.chunk)(rollout)
    num_decisions = int((-(-batch.targets.valid_t.sum(axis=1) // policy.chunk)).sum())
    (minibatch,) = minibatches(batch, size=64, rng=np.random.default_rng(0))
    assert minibatch.valid.sum() == num_decisions
    reference = copy_trainable(policy, params, OPTIMIZER, make_mesh())
    results = [
        take_step(
            make_ppo_step, kind, dataclasses.replace(config, microbatch_size=size), minibatch, True, 0.0, reference
        )
        for size in (None, 16)
    ]
    for _, metrics in results:
        for name, expected in (("ppo/ratio_mean", 1), ("ppo/approx_kl", 0), ("ppo/reference_kl", 0)):
            np.testing.assert_allclose(metrics[name], expected, atol=1e-4, err_msg=name)
    # Adam divides by the size of the gradient, which turns rounding of small ones into a visible difference.
    assert_close(results[0][0].params, results[1][0].params, atol=2e-4)


@pytest.mark.parametrize("kind", ["chain", pytest.param("sde", marks=pytest.mark.slow)])
def test_the_reference_prefers_nothing_and_sides_that_are_swapped_prefer_the_opposite(kind):
    policy, params = policy_and_params(kind)
    spec, config = toy.task_spec(), TPOConfig(variant="tpo", optimizer=OPTIMIZER, num_draws=4, draws_per_step=2)
    scored = score_pairs(policy, params, pairs(kind), spec, batch_size=32, num_draws=4)
    state, metrics = take_step(make_tpo_step, kind, config, scored)
    assert metrics["tpo/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["tpo/margin"] == pytest.approx(0, abs=1e-4)
    if kind == "chain":
        decisions = pairs(kind).chosen.decisions
        np.testing.assert_allclose(scored.chosen.ref_logp[..., 0], decisions.logp.sum(axis=-1), rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(scored.chosen.valid, decisions.valid)
    else:
        # Noise and times are the same for both sides, and different for every draw.
        np.testing.assert_array_equal(scored.chosen.seed, scored.rejected.seed)
        assert len(np.unique(scored.chosen.seed)) == scored.chosen.seed.size
        np.testing.assert_array_equal(scored.chosen.valid, pairs(kind).chosen.valid[:, 1:])
    # Another reference: what one side says of it, the other denies.
    other = jax.tree.map(lambda x: 1.02 * x, params)
    scored = score_pairs(policy, other, pairs(kind), spec, batch_size=32, num_draws=4)
    margin = [
        float(take_step(make_tpo_step, kind, config, batch)[1]["tpo/margin"])
        for batch in (scored, PairBatch(*scored[::-1]))
    ]
    assert abs(margin[0]) > 1e-5 and margin[0] == pytest.approx(-margin[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sde", "chain"])
def test_preferences_in_two_passes_are_those_in_one(kind):
    policy, params = policy_and_params(kind)
    config = TPOConfig(optimizer=OPTIMIZER, num_draws=4, draws_per_step=2)
    reference = jax.tree.map(lambda x: 1.02 * x, params)
    scored = score_pairs(policy, reference, pairs(kind), toy.task_spec(), batch_size=32, num_draws=4)
    whole, metrics = take_step(make_tpo_step, kind, config, scored)
    cut, cut_metrics = take_step(make_tpo_step, kind, dataclasses.replace(config, microbatch_size=8), scored)
    np.testing.assert_allclose(metrics["grad/norm"], cut_metrics["grad/norm"], rtol=1e-4)
    assert_close(whole.params, cut.params, atol=2e-4)


@pytest.mark.slow
def test_an_anchor_keeps_what_was_chosen_likely_and_chains_of_others_are_refused():
    policy, params = policy_and_params("chain")
    config = TPOConfig(variant="tpo", optimizer=OPTIMIZER)
    scored = score_pairs(policy, params, pairs("chain"), toy.task_spec(), batch_size=32)
    _, plain = take_step(make_tpo_step, "chain", config, scored)
    _, anchored = take_step(make_tpo_step, "chain", dataclasses.replace(config, anchor_coef=0.5), scored)
    valid = scored.chosen.valid
    expected = scored.chosen.ref_logp[..., 0][valid].mean()
    np.testing.assert_allclose(plain["tpo/chosen_logp"], expected, rtol=1e-4)
    np.testing.assert_allclose(anchored["tpo/loss"], plain["tpo/loss"] - 0.5 * expected, rtol=1e-4)
    assert abs(anchored["grad/norm"] - plain["grad/norm"]) > 1e-3
    foreign = jax.tree.map(lambda x: x, pairs("chain"))
    decisions = foreign.chosen.decisions
    for of_others in (None, decisions._replace(trace={"bins": np.zeros((*valid.shape, 2), np.int32)})):
        chosen = foreign.chosen._replace(decisions=of_others)
        with pytest.raises(
            DatasetError, match=r"pairs: got decisions (None|\{'bins'.*), expected \{'chain': .*'flow' does"
        ):
            score_pairs(policy, params, foreign._replace(chosen=chosen), toy.task_spec(), batch_size=32)


def sft_inputs():
    policy, _ = policy_and_params("sde")
    observation, *windows = demo_windows(2, window=policy.window)
    return prompted(policy, observation), *windows


@pytest.mark.slow
def test_microbatches_of_imitation_draw_what_the_whole_batch_does():
    batch = SFTBatch(*jax.tree.map(lambda x: x[:24], sft_inputs()))
    config = SFTConfig(optimizer=OPTIMIZER, batch_size=24)
    (whole, metrics), (cut, cut_metrics) = (
        take_step(make_sft_step, "sde", dataclasses.replace(config, microbatch_size=size), batch) for size in (None, 8)
    )
    np.testing.assert_allclose(metrics["sft/loss"], cut_metrics["sft/loss"], rtol=1e-5)
    assert_close(whole.params, cut.params, atol=2e-4)
    _, other = take_step(make_sft_step, "sde", dataclasses.replace(config, seed=1), batch)
    assert abs(other["sft/loss"] - metrics["sft/loss"]) > 1e-3


@pytest.mark.slow
def test_a_phase_ends_with_the_average_of_its_parameters(make_run):
    policy, params = policy_and_params("sde")
    batches = demo_batches(*sft_inputs(), size=16)
    config = SFTConfig(num_steps=3, batch_size=16, optimizer=OPTIMIZER, ema_decay=0.6)
    found = train_sft(policy, fresh(params), batches, config, make_run())
    # Step by step by hand.
    tx = make_optimizer(OPTIMIZER, num_steps=3)
    layout = {"mesh": make_mesh(), "rules": policy.sharding_rules, "freeze": frozen_params(policy, OPTIMIZER)}
    state, average = create_state(params, tx, **layout, has_average=True), params
    step = jax.jit(make_sft_step(policy, tx, config))
    for _, batch in zip(range(3), batches(0), strict=False):
        state, _ = step(state, SFTBatch(*batch))
        average = jax.tree.map(lambda a, p: 0.6 * a + 0.4 * p, average, state.params)
    assert_close(found, average, atol=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), found, state.params))) > 1e-4
    # Stopped after a step and resumed, it ends the same.
    run = dataclasses.replace(make_run("stopped"), resume=True)
    polls = iter([True])
    with pytest.raises(Interrupted):
        train_sft(
            policy, fresh(params), batches, config, dataclasses.replace(run, should_stop=lambda: next(polls, False))
        )
    assert_close(train_sft(policy, fresh(params), batches, config, run), found, atol=1e-6)
    with pytest.raises(ValueError, match=r"ema_decay: got 1.0, expected in \(0, 1\)"):
        SFTConfig(ema_decay=1.0)
