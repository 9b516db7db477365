"""The toy's mechanics, its signals, and how hard it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs import toy
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import collect_episodes
from stare_jax.stages import separate


def state(gripper, block, goal=(0.1, 0.0)):
    return toy.ToyState(jnp.array(gripper), jnp.array(block), jnp.array(goal), jnp.array(False))


def collect(choose, *, num_episodes=256, num_envs=64):
    def act(observation, signals, instructions, is_first):
        return Decision(choose(signals)), observation

    return collect_episodes(toy.ToyPush(num_envs), act, np.arange(num_episodes), stop_at_success=True).trajectory


def success_rate(trajectory):
    return (trajectory.signals.success & trajectory.valid).any(axis=1).mean()


def test_a_free_gripper_moves_and_the_block_does_not():
    after = toy.step_state(state((0.0, 0.0), (0.1, 0.0)), jnp.array([1.0, -0.5]))
    np.testing.assert_allclose(after.gripper, [toy.MAX_STEP, -0.5 * toy.MAX_STEP], rtol=1e-5)
    np.testing.assert_allclose(after.block, [0.1, 0.0])
    assert not after.is_contact
    # Beyond the range of an action nothing more happens.
    further = toy.step_state(state((0.0, 0.0), (0.1, 0.0)), jnp.array([7.0, -0.5]))
    np.testing.assert_allclose(further.gripper, after.gripper)


def test_a_block_that_is_hit_head_on_is_pushed_straight_and_off_centre_to_the_side():
    touch = toy.GRIPPER_RADIUS + toy.BLOCK_RADIUS
    after = toy.step_state(state((0.0, 0.0), (touch, 0.0)), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(after.block, [touch + toy.MAX_STEP, 0.0], atol=1e-6)
    assert after.is_contact
    after = toy.step_state(state((0.0, 0.0), (0.03, 0.01)), jnp.array([1.0, 0.0]))
    assert after.block[1] > 0.01 and after.block[0] > 0.03
    np.testing.assert_allclose(jnp.linalg.norm(after.block - after.gripper), touch, rtol=1e-4)


def test_signals_and_observation_say_where_things_are():
    observed, signals = toy.observe_state(state((0.01, 0.02), (0.03, 0.04), goal=(0.05, 0.05)))
    np.testing.assert_allclose(observed, [0.01, 0.02, 0.03, 0.04, 0.05, 0.05])
    np.testing.assert_allclose(signals.obj_pos, [0.03, 0.04, toy.HEIGHT])
    # 2.2 cm from the goal is success.
    assert signals.success and not toy.observe_state(state((0.0, 0.0), (0.03, 0.04), goal=(0.05, 0.06)))[1].success


def test_episodes_depend_on_their_seed_alone_and_environments_reset_one_by_one():
    env, other = toy.ToyPush(3), toy.ToyPush(2)
    first = env.reset([5, 6, 7]).observation.state
    # Compiled for another number of environments the last bit may differ.
    np.testing.assert_allclose(other.reset([7, 5]).observation.state, first[[2, 0]], rtol=1e-5)
    after = env.step(np.ones((3, 2), np.float32), {1: 9}).observation.state
    np.testing.assert_allclose(after[1], other.reset([9, 9]).observation.state[0], rtol=1e-5)
    np.testing.assert_allclose(after[0, :2], first[0, :2] + toy.MAX_STEP, rtol=1e-4)
    with pytest.raises(ValueError, match="seeds: got 2, expected one for each of 3 environments"):
        env.reset([1, 2])


def test_chance_succeeds_rarely_and_the_expert_always():
    rng = np.random.default_rng(0)
    chance = collect(lambda signals: rng.uniform(-1, 1, (64, 2)).astype(np.float32), num_episodes=2048)
    assert 0.0005 < success_rate(chance) < 0.05
    assert success_rate(collect(toy.expert_action)) == 1.0
    slow = collect(lambda signals: toy.expert_action(signals, speed=0.2))
    assert 0.02 < success_rate(slow) < 0.98


def test_the_expert_passes_through_every_stage():
    spec = toy.task_spec()
    trajectory = collect(lambda signals: toy.expert_action(signals, speed=0.6))
    separation = jax.vmap(lambda s, v: separate(spec, s, v))(trajectory.signals, trajectory.valid)
    done = separation.completed.all(axis=1)
    assert done.mean() > 0.9
    # Reach and push always take a step of their own, contact and goal may be over at once.
    entered = np.asarray(separation.entered_at < trajectory.valid.shape[1]).mean(axis=0)
    assert entered[0] == 1.0 and (entered[1:] > 0.2).all()
