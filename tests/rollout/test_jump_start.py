"""Episodes that an expert begins: where the policy takes over, and what is learnt from."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_expert import expert_of_toy
from toy_task import Writer, fresh

from stare_jax.config import UserError
from stare_jax.envs.groups import GroupedEnvs
from stare_jax.envs.toys import TOYS, ToyEnv
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes
from stare_jax.rollout.jump_start import JumpStartConfig, draw_stages, lead
from stare_jax.stages import separate
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, make_prepare, train_ppo

PLACE = TOYS["place"]
HALF = JumpStartConfig(fraction=0.5)
SEEDS = np.arange(24)


def stand_still(observation, signals, instructions, is_first):
    rows = len(is_first)
    zeros = np.zeros((rows, 1), np.float32)
    return Decision(np.zeros((rows, PLACE.action_dim), np.float32), {"bins": zeros}, zeros, zeros[:, 0]), observation


def play(env, **options):
    led = lead(env, PLACE.spec, [expert_of_toy(PLACE)], HALF)
    return collect_episodes(led, stand_still, SEEDS, stop_at_success=True, in_turns=True, **options)


def stages_of(rollout):
    return np.asarray(jax.vmap(lambda *of: separate(PLACE.spec, *of).stage_t)(*rollout.trajectory[1:3]))


def test_each_later_stage_is_taken_over_equally_often():
    stages = draw_stages(JumpStartConfig(fraction=0.6), range(6000), 4)
    shares = np.bincount(stages) / len(stages)
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.2, 0.2], atol=0.02)
    np.testing.assert_array_equal(draw_stages(JumpStartConfig(fraction=0.6), [5, 4, 3], 4), stages[[5, 4, 3]])
    assert not draw_stages(JumpStartConfig(), range(100), 4).any()


def test_the_expert_acts_until_the_stage_has_begun_and_the_policy_from_there():
    rollout, handover = play(ToyEnv(PLACE, 8)), draw_stages(HALF, SEEDS, 4)
    assert set(handover) == {0, 1, 2, 3}
    tcp, valid = rollout.trajectory.signals.tcp_pos, rollout.trajectory.valid
    moved = np.abs(np.diff(tcp, axis=1)).max(axis=2) > 1e-6
    is_led = (stages_of(rollout)[:, :-1] < handover[:, None]) & valid[:, 1:]
    assert not (moved & ~is_led)[valid[:, 1:]].any()
    assert (moved & is_led).sum() > 0.8 * is_led.sum()  # It stands while the fingers close.
    assert (stages_of(rollout).max(axis=1) >= handover).all()
    # The expert's way is that of an episode of its own.
    expert = collect_episodes(
        lead(ToyEnv(PLACE, 8), PLACE.spec, [expert_of_toy(PLACE)], JumpStartConfig(fraction=0.999)),
        stand_still,
        SEEDS,
        stop_at_success=True,
    )
    both = is_led & (stages_of(expert)[:, :-1] < draw_stages(JumpStartConfig(fraction=0.999), SEEDS, 4)[:, None])
    assert both.sum() > 50
    np.testing.assert_array_equal(tcp[:, 1:][both], expert.trajectory.signals.tcp_pos[:, 1:][both])


def test_groups_and_idle_environments_change_no_episode():
    whole = play(ToyEnv(PLACE, 8))
    for env in (GroupedEnvs([ToyEnv(PLACE, 3), ToyEnv(PLACE, 2)]), ToyEnv(PLACE, 40)):
        jax.tree.map(np.testing.assert_array_equal, play(env).trajectory.signals, whole.trajectory.signals)


def in_chunks_of(chunk):
    def act(*state):
        decision, seen = stand_still(*state)
        action = decision.action if chunk == 1 else np.repeat(decision.action[:, None], chunk, axis=1)
        return decision._replace(action=action), seen

    return act


def test_the_policy_takes_over_where_it_decides_and_not_within_a_chunk():
    """The rest of a chunk was decided on before the stage: it would open a hand that the expert has closed."""
    env = GroupedEnvs([ToyEnv(PLACE, 8), ToyEnv(PLACE, 8)])
    led = lead(env, PLACE.spec, [expert_of_toy(PLACE)], HALF, chunk=4)
    rollout = collect_episodes(led, in_chunks_of(4), SEEDS, stop_at_success=True, in_turns=True)
    signals, valid_t = rollout.trajectory.signals, rollout.trajectory.valid[:, 1:]
    moved = (np.abs(np.diff(signals.tcp_pos, axis=1)).max(axis=2) > 1e-6) & valid_t
    stage_t, until = stages_of(rollout)[:, :-1], draw_stages(HALF, SEEDS, 4)[:, None]
    decided_in = np.repeat(stage_t[:, ::4], 4, axis=1)[:, : stage_t.shape[1]]
    assert not moved[decided_in >= until].any()
    rest = (decided_in < until) & (stage_t >= until) & valid_t
    assert rest.sum() > 4 and moved[rest].mean() > 0.6


@pytest.mark.parametrize("chunk", [1, 4])
def test_nothing_is_learnt_from_decisions_before_the_handover(chunk):
    env = lead(ToyEnv(PLACE, 8), PLACE.spec, [expert_of_toy(PLACE)], HALF, chunk=chunk)
    rollout = collect_episodes(env, in_chunks_of(chunk), SEEDS, stop_at_success=True)
    handover = draw_stages(HALF, SEEDS, 4)
    batch = make_prepare(PLACE.spec, PPOConfig(), chunk=chunk)(rollout._replace(handover=handover))
    own = rollout.trajectory.decisions.valid & (stages_of(rollout)[:, :-1:chunk] >= handover[:, None])
    np.testing.assert_array_equal(batch.decisions.valid, own)
    np.testing.assert_array_equal(batch.targets.valid_d, own)
    assert not batch.advantage[~own].any() and abs(batch.advantage[own].mean()) < 1e-5
    # What comes after the handover is worth the same, whoever acted before.
    alone = make_prepare(PLACE.spec, PPOConfig(), chunk=chunk)(rollout).targets
    np.testing.assert_array_equal(batch.targets.return_d[own], alone.return_d[own])


def test_training_tells_of_led_episodes_apart_and_compiles_once(tmp_path):
    policy = make_mlp(
        MLPConfig(PLACE.state_dim, PLACE.action_dim, hidden_dims=(16,), value_dims=(16,)), PLACE.norm_stats
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    run = Run(tmp_path, PLACE.norm_stats, writer=Writer())
    config = PPOConfig(num_iterations=2, num_episodes=24, minibatch_size=256, jump_start=HALF, whiten_over="stage")
    train_ppo(policy, fresh(params), ToyEnv(PLACE, 8), PLACE.spec, config, run, [expert_of_toy(PLACE)])
    first, *later = run.writer.lines
    assert 0 < first["env/num_episodes"] < 24
    led = [name for name in first if name.startswith("env/success_from_")]
    assert len(led) == 3 and all(np.isfinite(first[name]) for name in led)
    assert sum(run.writer.column("perf/compilations")[1:]) == 0
    again = dataclasses.replace(run, directory=tmp_path / "b")
    with pytest.raises(ValueError, match="experts: got 0, expected one for each of 1 tasks"):
        train_ppo(policy, fresh(params), ToyEnv(PLACE, 8), PLACE.spec, config, again)


def test_a_batch_without_a_decision_of_the_policy_is_a_users_mistake():
    """There is nothing to whiten, and no minibatch."""
    rollout = collect_episodes(ToyEnv(PLACE, 2), stand_still, range(2), stop_at_success=True)
    prepare = make_prepare(PLACE.spec, PPOConfig())
    assert prepare(rollout).decisions.valid.any()
    with pytest.raises(UserError, match="jump_start.fraction: got no decision of the policy in 2 episodes.*smaller"):
        prepare(rollout._replace(handover=np.array([2, 3])))


def test_what_cannot_be_is_refused():
    spec = PLACE.spec
    parts = {name: getattr(spec, name)[:1] for name in ("stage_names", "event_fns", "cost_fns", "potential_fns")}
    whole = dataclasses.replace(spec, **parts, distance_fns=spec.distance_fns[:1])
    with pytest.raises(ValueError, match="fraction: got 0.5 for a task of one stage, expected 0"):
        lead(ToyEnv(PLACE, 1), whole, [expert_of_toy(PLACE)], HALF)
    with pytest.raises(ValueError, match="fraction: got 1.0, expected less"):
        JumpStartConfig(fraction=1.0)
    with pytest.raises(ValueError, match="jump_start: got JumpStartConfig.*expected none without a critic"):
        PPOConfig(advantage="grpo", group_size=4, jump_start=HALF)
