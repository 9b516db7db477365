"""The optimiser steps: what is cut into microbatches adds up, padding does nothing, frozen stays frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import NUM_ENVS, demonstrations, random_pairs

from stare_jax.envs import toy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.state.train_state import create_state
from stare_jax.train.ppo import PPOConfig, make_ppo_step, make_prepare
from stare_jax.train.ppo_batch import minibatches
from stare_jax.train.sft import SFTBatch, SFTConfig, make_sft_step
from stare_jax.train.tpo import TPOConfig, make_tpo_step
from stare_jax.train.tpo_reference import score_pairs

FAST = OptimizerConfig(learning_rate=1e-2)
VALUE_FROZEN = dataclasses.replace(FAST, freeze=("^value",))
PPO = PPOConfig(optimizer=FAST, minibatch_size=64, target_kl=0.1)


@functools.cache
def compiled_step(make_step, policy, config):
    """The optimiser and the compiled step of a configuration."""
    tx = make_optimizer(config.optimizer, num_steps=10)
    return tx, jax.jit(make_step(policy, tx, config))


def take_step(make_step, policy, params, config, batch, *extra):
    tx, step = compiled_step(make_step, policy, config)
    layout = {"mesh": make_mesh(), "rules": policy.sharding_rules, "freeze": config.optimizer.freeze}
    return step(create_state(params, tx, **layout), batch, *extra)


def assert_same(got, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def moved(before, after):
    """Names of the top-level groups of parameters that changed."""
    return {name for name in before if not jax.tree.all(jax.tree.map(jnp.array_equal, before[name], after[name]))}


@pytest.fixture(scope="module")
def prepared(policy, params, spec):
    act = policy_act(policy, params, jax.random.key(3))
    rollout = collect_episodes(toy.ToyPush(NUM_ENVS), act, np.arange(4), stop_at_success=True)
    return make_prepare(spec, PPOConfig())(rollout)


@pytest.fixture(scope="module")
def ppo_batch(prepared):
    return next(minibatches(prepared, size=64, rng=np.random.default_rng(0)))


def test_minibatches_hold_every_decision_once_and_none_is_small(prepared):
    num_decisions = int(prepared.targets.valid_t.sum())
    size = num_decisions // 2 - 1  # so that two are left over
    parts = list(minibatches(prepared, size=size, rng=np.random.default_rng(0)))
    counts = [int(part.valid.sum()) for part in parts]
    assert len(parts) == 3 and sum(counts) == num_decisions and max(counts) - min(counts) <= 1
    assert all(len(part.valid) == size for part in parts)
    logp = np.concatenate([part.old_logp[part.valid] for part in parts])
    everything = prepared.decisions.logp[prepared.targets.valid_t]
    np.testing.assert_array_equal(np.sort(logp, axis=0), np.sort(everything, axis=0))


def test_sft_microbatches_give_the_step_of_the_whole_batch(policy, params):
    observation, action = demonstrations(4)
    batch = SFTBatch(*jax.tree.map(lambda x: x[:24], (observation, action, np.ones(len(action), bool))))
    whole, metrics = take_step(make_sft_step, policy, params, SFTConfig(optimizer=VALUE_FROZEN), batch)
    config = SFTConfig(optimizer=VALUE_FROZEN, batch_size=24, microbatch_size=8)
    cut, cut_metrics = take_step(make_sft_step, policy, params, config, batch)
    # Adam divides by the size of the gradient, which turns rounding of small ones into a visible difference.
    assert_same(cut.params, whole.params, atol=1e-4)
    assert_same(cut_metrics, metrics, rtol=1e-4)
    assert moved(params, whole.params) == {"trunk_0", "logits"} and int(whole.step) == 1


@pytest.mark.parametrize("microbatch_size", [None, 8])
def test_steps_keep_their_types_where_jax_has_64_bits_as_well(policy, params, ppo_batch, microbatch_size):
    """Another library in the process may have asked for them (jax_enable_x64)."""
    observation, action = demonstrations(4)
    sft_batch = SFTBatch(*jax.tree.map(lambda x: x[:24], (observation, action, np.ones(len(action), bool))))
    ppo = dataclasses.replace(PPO, microbatch_size=microbatch_size)
    sft = SFTConfig(optimizer=VALUE_FROZEN, batch_size=24, microbatch_size=microbatch_size)
    for make_step, config, inputs in (
        (make_sft_step, sft, (sft_batch,)),
        (make_ppo_step, ppo, (ppo_batch, True, 0.0)),
    ):
        tx = make_optimizer(config.optimizer, num_steps=10)
        layout = {"mesh": make_mesh(), "rules": policy.sharding_rules, "freeze": config.optimizer.freeze}
        state = create_state(params, tx, **layout)
        before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        with jax.enable_x64(True):
            after, metrics = jax.eval_shape(make_step(policy, tx, config), state, *inputs)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before
        assert {leaf.dtype for leaf in metrics.values()} == {np.dtype(np.float32)}


def test_ppo_starts_at_ratio_one(policy, params, ppo_batch):
    _, metrics = take_step(make_ppo_step, policy, params, PPO, ppo_batch, True, 0.0)
    assert metrics["ppo/clip_frac"] == 0 and metrics["ppo/stopped"] == 0
    ratios = [metrics[f"ppo/ratio_{name}"] for name in ("min", "mean", "max")]
    np.testing.assert_allclose(ratios, 1.0, atol=1e-5)


def test_ppo_padding_changes_nothing(policy, params, ppo_batch):
    whole, metrics = take_step(make_ppo_step, policy, params, PPO, ppo_batch, True, 0.0)

    def pad(x):
        return np.concatenate([x, np.full_like(x, 1e6 if x.dtype == np.float32 else 0)])

    padded, padded_metrics = take_step(make_ppo_step, policy, params, PPO, jax.tree.map(pad, ppo_batch), True, 0.0)
    assert_same(padded.params, whole.params, atol=1e-5)
    assert_same(padded_metrics, metrics, rtol=1e-4, atol=1e-6)


# With three valid rows one of the four microbatches has none.
@pytest.mark.parametrize("num_valid", [64, 3])
def test_ppo_microbatches_give_the_step_of_the_whole_batch(policy, params, ppo_batch, num_valid):
    batch = ppo_batch._replace(valid=np.arange(64) < num_valid)
    whole, metrics = take_step(make_ppo_step, policy, params, PPO, batch, True, 0.0)
    config = dataclasses.replace(PPO, microbatch_size=16)
    cut, cut_metrics = take_step(make_ppo_step, policy, params, config, batch, True, 0.0)
    assert_same(cut.params, whole.params, atol=1e-4)
    np.testing.assert_allclose(cut_metrics["ppo/loss"], metrics["ppo/loss"], rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(value) for value in cut_metrics.values())


def test_the_extremes_of_the_ratio_are_those_of_all_decisions(policy, params, ppo_batch):
    """One decision in 64 has become twice as likely, one half as likely: no average hides them."""
    shift = np.zeros(64, np.float32)
    shift[5], shift[40] = np.log(2), -np.log(2)
    batch = ppo_batch._replace(old_logp=ppo_batch.old_logp - shift[:, None] / 2)
    for size in (None, 16):
        config = dataclasses.replace(PPO, microbatch_size=size)
        _, metrics = take_step(make_ppo_step, policy, params, config, batch, True, 0.0)
        np.testing.assert_allclose([metrics["ppo/ratio_min"], metrics["ppo/ratio_max"]], [0.5, 2], rtol=1e-4)


def test_ppo_does_not_step_beyond_its_target_kl(policy, params, ppo_batch):
    # A ratio of e is a divergence of e - 1 - 1 = 0.72 by the estimator ratio - 1 - log(ratio).
    far = ppo_batch._replace(old_logp=ppo_batch.old_logp - 0.5)  # of each of the two numbers
    state, metrics = take_step(make_ppo_step, policy, params, PPO, far, True, 0.0)
    np.testing.assert_allclose(metrics["ppo/approx_kl"], np.e - 2, rtol=1e-4)
    assert metrics["ppo/stopped"] == 1 and int(state.step) == 0 and not moved(params, state.params)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", 1.0), ("linear", 0.75), ("cosine", (1 + np.sqrt(0.5)) / 2)]
)
def test_a_ppo_step_is_as_long_as_the_schedule_says_for_the_iteration(policy, params, ppo_batch, schedule, expected):
    config = dataclasses.replace(PPO, optimizer=dataclasses.replace(FAST, schedule=schedule))
    tx = make_optimizer(config.optimizer, num_steps=None)
    step = jax.jit(make_ppo_step(policy, tx, config))
    start = create_state(params, tx, mesh=make_mesh(), rules=policy.sharding_rules)
    before, lengths = params["logits"]["kernel"], []
    for fraction in (0, 0.25, 1):
        state, _ = step(start, ppo_batch, True, np.float32(fraction))
        lengths.append(np.abs(state.params["logits"]["kernel"] - before).sum())
    np.testing.assert_allclose(lengths[1] / lengths[0], expected, rtol=1e-3)
    assert schedule == "constant" or lengths[2] < 1e-6 * lengths[0]


def test_a_warm_up_step_moves_the_value_head_alone_and_leaves_the_moments_of_the_rest(policy, params, ppo_batch):
    tx, step = compiled_step(make_ppo_step, policy, PPO)
    start = create_state(params, tx, mesh=make_mesh(), rules=policy.sharding_rules)
    warm, _ = step(start, ppo_batch, False, 0.0)
    assert moved(params, warm.params) == {"value_head"}
    # The first real step is the one that an optimiser without a past would take.
    after, _ = step(warm, ppo_batch, True, 0.0)
    fresh, _ = step(start, ppo_batch, True, 0.0)
    assert_same(after.params["trunk_0"], fresh.params["trunk_0"], atol=1e-6)
    assert moved(warm.params, after.params) == {"trunk_0", "logits", "value_head"}


def test_tpo_in_two_passes_is_tpo_in_one(policy, params, spec):
    pairs = random_pairs(policy, params, 3)
    batch = score_pairs(policy, jax.jit(policy.init)(jax.random.key(5)), pairs, spec, batch_size=50)
    config = TPOConfig(optimizer=VALUE_FROZEN)
    whole, metrics = take_step(make_tpo_step, policy, params, config, batch)
    # 3 pairs of 2 x 30 decisions are not a multiple of 50.
    cut, cut_metrics = take_step(make_tpo_step, policy, params, dataclasses.replace(config, microbatch_size=50), batch)
    assert_same(cut_metrics, metrics, rtol=1e-3, atol=1e-6)
    assert_same(cut.params, whole.params, atol=1e-4)
    assert moved(params, whole.params) == {"trunk_0", "logits"}


def test_more_imitation_is_of_the_chosen_actions_and_of_nothing_else(policy, params, spec):
    """Minus their mean log-probability, which is the reference's before the first step; rejected ones do not matter."""
    batch = score_pairs(policy, params, random_pairs(policy, params, 3), spec, batch_size=64)
    config = TPOConfig(variant="imitation", optimizer=VALUE_FROZEN)
    after, metrics = take_step(make_tpo_step, policy, params, config, batch)
    assert metrics["tpo/loss"] == pytest.approx(-batch.chosen.ref_logp[batch.chosen.valid].mean(), rel=1e-5)
    other, _ = take_step(make_tpo_step, policy, params, config, batch._replace(rejected=batch.chosen))
    assert_same(other.params, after.params, atol=1e-7)
    assert moved(params, after.params) == {"trunk_0", "logits"}


def test_stages_and_costs_of_a_pair_are_those_of_its_task(policy, params, spec):
    pairs = random_pairs(policy, params, 4)
    other = dataclasses.replace(spec, params=dataclasses.replace(spec.params, delta_reach=0.09, lambda_perp=7.0))
    together = score_pairs(
        policy, params, pairs._replace(task=np.array([1, 0, 0, 1], np.int32)), (spec, other), batch_size=64
    )
    alone = [score_pairs(policy, params, pairs, one, batch_size=64) for one in (spec, other)]
    assert (alone[0].chosen.stage_mask != alone[1].chosen.stage_mask).any()
    for row, k in enumerate([1, 0, 0, 1]):
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b[row], rtol=1e-5), together, alone[k])


def test_pairs_are_scored_by_the_reference_policy_where_there_are_actions(policy, params, spec):
    pairs = random_pairs(policy, params, 3)
    batch = score_pairs(policy, params, pairs, spec, batch_size=16)
    for side, trajectory in zip(batch, (pairs.chosen, pairs.rejected), strict=True):
        # The reference is the policy that acted, so what it thought then is what it thinks now.
        np.testing.assert_allclose(side.ref_logp[..., 0], trajectory.decisions.logp.sum(axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(side.valid, trajectory.valid[:, 1:])
        np.testing.assert_array_equal(side.stage_mask.sum(axis=1), side.valid)
        assert side.stage_cost.shape == (3, spec.num_stages) and (side.stage_cost >= 0).all()
