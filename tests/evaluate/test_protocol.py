import jax
import numpy as np
import pytest

from stare_jax.envs import toy
from stare_jax.evaluate.protocol import EvalConfig, episode_seeds, evaluate, evaluate_act, measure
from stare_jax.logging import Clock, Interrupted
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.types import Signals


def make_signals(distance, contact, success):
    """Signals `[E, T]` of the push family: an object at `distance` from its goal, the gripper beside it."""
    distance = np.asarray(distance, np.float32)
    shape = distance.shape
    goal = np.zeros((*shape, 3), np.float32)
    obj = goal + np.stack([distance, 0 * distance, 0 * distance], axis=-1)
    upright = np.broadcast_to(np.array([1, 0, 0, 0], np.float32), (*shape, 4))
    return Signals(
        tcp_pos=obj + np.array([0.0, 1.0, 0.0], np.float32),
        tcp_quat=upright,
        obj_pos=obj,
        obj_quat=upright,
        grasp_pos=obj,
        goal_pos=goal,
        goal_quat=upright,
        is_grasped=np.zeros(shape, bool),
        is_contact=np.asarray(contact, bool),
        success=np.asarray(success, bool),
        support_z=np.zeros(shape, np.float32),
    )


def test_measure_reads_hand_made_episodes(spec):
    # delta_goal of the toy task is 0.035. Contact completes reach and contact at once, so stage 1 is skipped.
    signals = make_signals(
        distance=[[0.2, 0.2, 0.1, 0.03, 0.02], [0.3, 0.3, 0.3, 0.3, 0.3], [0.4, 0.3, 0.2, 0.0, 0.0]],
        contact=[[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]],
        success=[[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
    )
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    episodes = measure(spec, signals, valid, [5, 6, 9])
    np.testing.assert_array_equal(episodes.seed, [5, 6, 9])
    np.testing.assert_array_equal(episodes.success_once, [True, False, False])
    np.testing.assert_array_equal(episodes.success_end, [False, False, False])
    np.testing.assert_array_equal(episodes.success_at, [3, 5, 5])
    np.testing.assert_array_equal(episodes.contacted, [True, False, True])
    np.testing.assert_array_equal(episodes.grasped, [False, False, False])
    np.testing.assert_array_equal(episodes.stage_reached, [3, 0, 2])
    np.testing.assert_array_equal(episodes.completed, [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(episodes.entered_at, [[0, 5, 1, 3], [0, 5, 5, 5], [0, 5, 1, 5]])
    np.testing.assert_array_equal(episodes.stage_len, [[1, 0, 2, 2], [5, 0, 0, 0], [1, 0, 2, 0]])
    np.testing.assert_array_equal(episodes.start, [0, 1, 2])


def test_measure_recognises_repeated_starts(spec):
    signals = make_signals(
        distance=[[0.2], [0.3], [0.20005], [0.3]], contact=np.zeros((4, 1)), success=np.zeros((4, 1))
    )
    episodes = measure(spec, signals, np.ones((4, 1), bool), range(4))
    np.testing.assert_array_equal(episodes.start, [0, 1, 0, 1])


def test_evaluate_runs_to_the_horizon_and_is_reproducible(spec):
    config = EvalConfig(num_episodes=7, first_seed=40, num_videos=0)
    policy = make_mlp(MLPConfig(), toy.norm_stats())
    params = jax.jit(policy.init)(jax.random.key(0))
    clock = Clock()
    evaluation, rollout = evaluate(policy, params, toy.ToyPush(4), spec, config, clock=clock)
    again, _ = evaluate(policy, params, toy.ToyPush(4), spec, config, key=jax.random.key(9))
    assert rollout.trajectory.valid.all() and evaluation.info.num_steps == 7 * toy.HORIZON
    np.testing.assert_array_equal(evaluation.episodes.seed, np.arange(40, 47))
    # Greedy, so that the key makes no difference.
    jax.tree.map(np.testing.assert_array_equal, evaluation.episodes, again.episodes)
    assert set(clock.seconds()) == {"env", "policy", "other"}
    assert evaluation.info[:4] == ("ToyPush-v0", spec.stage_names, toy.HORIZON, 0.0)


def test_success_at_the_end_differs_from_success_at_any_step(spec, expert_act):
    """The expert at full speed pushes the block into the goal and, as nobody stops it, out again."""
    evaluation, _ = evaluate_act(expert_act(1.0), toy.ToyPush(4), spec, EvalConfig(num_episodes=20, num_videos=0))
    assert evaluation.episodes.success_once.mean() > 0.8
    assert evaluation.episodes.success_end.sum() < evaluation.episodes.success_once.sum()


def test_evaluate_keeps_images_only_for_films(spec, expert_act):
    for num_videos, cameras in ((0, set()), (1, {"base"})):
        config = EvalConfig(num_episodes=7, num_videos=num_videos)
        _, rollout = evaluate_act(expert_act(1.0), toy.ToyPush(4), spec, config)
        assert set(rollout.trajectory.observation.images) == cameras


def test_evaluate_can_be_interrupted(spec, expert_act):
    calls = iter(range(100))
    with pytest.raises(Interrupted, match="0 of 6 episodes"):
        evaluate_act(
            expert_act(1.0), toy.ToyPush(4), spec, EvalConfig(num_episodes=6), should_stop=lambda: next(calls) > 5
        )


class OneDies(toy.ToyPush):
    """The simulator of the second environment dies in its third step."""

    num_calls = 0

    def step(self, action, reset_seeds=None, *, reproducible=False):
        state = super().step(action, reset_seeds, reproducible=reproducible)
        self.num_calls += 1
        return state._replace(alive=np.array([True, self.num_calls != 3, True, True]))


def test_evaluate_drops_an_episode_whose_simulator_died(spec, expert_act):
    evaluation, rollout = evaluate_act(expert_act(1.0), OneDies(4), spec, EvalConfig(num_episodes=7, num_videos=0))
    assert rollout.num_dropped == 1
    np.testing.assert_array_equal(evaluation.episodes.valid, [True, False, True, True, True, True, True])


def test_config_says_what_is_wrong():
    assert episode_seeds(EvalConfig(num_episodes=3, first_seed=7)) == [7, 8, 9]
    assert episode_seeds(EvalConfig(seeds=(4, 2))) == [4, 2]
    for arguments, message in [
        ({"num_episodes": -1}, "num_episodes: got -1"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"num_videos": -1}, "num_videos: got -1"),
        ({"seeds": (3, 3)}, "seeds: got repeated"),
        ({"first_seed": 100_000_000}, "seeds: got 100000000"),
    ]:
        with pytest.raises(ValueError, match=message):
            EvalConfig(**arguments)
