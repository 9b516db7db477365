"""Rewards of an episode, by hand."""

import jax
import numpy as np
import pytest
from stage_signals import make_signals, pad, separation_of

from stare_jax.stages import (
    TASKS,
    check_reward,
    dense_rewards,
    episode_rewards,
    get_task,
    rl4vla_rewards,
    success_rewards,
)


@pytest.mark.parametrize(
    "success, valid, expected",
    [
        ([0, 0, 1, 1], None, [0, 1, 0]),  # Success of state 2 rewards action 1, once.
        ([0, 0, 1, 0, 1], None, [0, 1, 0, 0]),
        ([1, 1, 0], None, [1, 0]),  # The first state is led to by no action.
        ([0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0]),  # A state that does not exist.
        ([0, 0, 0], None, [0, 0]),
    ],
)
def test_success_rewards(success, valid, expected):
    valid = None if valid is None else np.array(valid, bool)
    reward = success_rewards(np.array(success, bool), valid)
    np.testing.assert_array_equal(reward, np.float32(expected))
    assert reward.dtype == np.float32


def flags(text):
    """`..x` -> False, False, True."""
    return np.array([letter == "x" for letter in text], bool)


@pytest.mark.parametrize(
    "grasped, success, expected",
    [
        # A first grasp pays .1, the fifth state in a row another .1, success in the hand 1.
        (".xxxxxx", "......x", [0.1, 0, 0, 0, 0.1, 1.0]),
        # Four states in a row are not five; a second grasp pays nothing; five in a row pay once.
        (".xxxx.xxxxxx", "............", [0.1, 0, 0, 0, 0, 0, 0, 0, 0, 0.1, 0]),
        # Success after the object has been let go counts, since it has been held before; it is taken back, and paid
        # again.
        (".x.......", "...xx..x.", [0.1, 0, 1.0, 0, -1.0, 0, 1.0, -1.0]),
        # Success without any grasp pays nothing until there is one: .1 + 1 then.
        ("...x", ".xxx", [0, 0, 1.1]),
        # The first state is led to by no action: its grasp pays with the next state, and does not count in a row.
        ("xxxxx", ".....", [0.1, 0, 0, 0]),
    ],
)
def test_rl4vla_rewards(grasped, success, expected):
    reward = rl4vla_rewards(flags(grasped), flags(success))
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    assert reward.dtype == np.float32
    # What does not exist pays nothing, whatever its flags are, and takes nothing back.
    exists = np.arange(len(grasped) + 3) < len(grasped)
    padded = rl4vla_rewards(flags(grasped + "xx."), flags(success + "x.x"), exists)
    np.testing.assert_allclose(padded, [*expected, 0, 0, 0], atol=1e-6)


def test_rl4vla_rewards_of_a_shorter_hold():
    reward = rl4vla_rewards(flags(".xx."), flags("...."), num_held=2)
    np.testing.assert_allclose(reward, [0.1, 0.1, 0], atol=1e-6)


@pytest.mark.parametrize(
    "env_id, fields, expected",
    [
        # Reach .3 m, grasp .1 m; then object to goal: .5 (3-4-5) and .02.
        (
            "StackCube-v1",
            {
                "tcp_pos": [[9, 0, 0], [0.3, 0, 0], [0.1, 0, 0], [7, 0, 0], [7, 0, 0]],
                "obj_pos": [[9, 0, 0], [9, 0, 0], [9, 0, 0], [0.3, 0, 0.4], [0, 0.02, 0]],
            },
            [-0.3, -0.1, -0.5, -0.02],
        ),
        (
            "PullCube-v1",
            {
                "tcp_pos": [[9, 0, 0], [0.3, 0, 0], [0.1, 0, 0], [7, 0, 0], [7, 0, 0]],
                "obj_pos": [[9, 0, 0], [9, 0, 0], [9, 0, 0], [0.3, 0, 0.4], [0, 0.02, 0]],
            },
            [-0.3, -0.1, -0.5, -0.02],
        ),
        # Lift: h_min = .05, the object at .02 above its support. Upright: the x axis 30 degrees off the vertical.
        (
            "LiftPegUpright-v1",
            {
                "tcp_pos": [[9, 0, 0], [0.3, 0, 0], [0.1, 0, 0], [7, 0, 0], [7, 0, 0]],
                "obj_pos": [0, 0, 0.52],
                "support_z": 0.5,
                "obj_quat": [[1, 0, 0, 0]] * 4 + [[np.cos(np.pi / 6), 0, np.sin(np.pi / 6), 0]],
            },
            [-0.3, -0.1, -0.03, -np.pi / 6],
        ),
    ],
)
def test_dense_rewards(env_id, fields, expected):
    spec, signals = get_task(env_id), make_signals(5, **fields)
    labels = [0, 0, 1, 2, 3]
    reward = dense_rewards(spec, signals, separation_of(labels))
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    assert reward.dtype == np.float32
    padded, exists = pad(signals, 2, 5.0), np.arange(7) < 5
    np.testing.assert_allclose(
        dense_rewards(spec, padded, separation_of([*labels, 3, 3]), exists), [*expected, 0, 0], atol=1e-6
    )


@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_has_a_distance_for_every_stage(env_id):
    spec = get_task(env_id)
    signals = make_signals(5, tcp_pos=[0.3, 0, 0], obj_quat=[0.6, 0, 0.8, 0], goal_pos=[0, 0.2, 0])
    reward = jax.jit(dense_rewards, static_argnums=0)(spec, signals, separation_of([0, 0, 1, 2, 3]))
    assert (np.asarray(reward) < 0).all()


def test_a_reward_is_chosen_by_its_name():
    spec, separation = get_task("StackCube-v1"), separation_of([0, 0, 1, 2, 3])
    signals = make_signals(5, tcp_pos=[0.3, 0, 0], is_grasped=flags("..xxx"), success=flags("....x"))
    expected = {
        "success": success_rewards(signals.success),
        "rl4vla": rl4vla_rewards(signals.is_grasped, signals.success),
        "dense": dense_rewards(spec, signals, separation),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(episode_rewards(name, spec, signals, separation), values)
    assert len({tuple(np.asarray(values).tolist()) for values in expected.values()}) == 3


def test_a_reward_that_a_task_cannot_earn_is_refused():
    with pytest.raises(ValueError, match=r"reward: got 'sparse', expected one of \('success', 'rl4vla', 'dense'\)"):
        check_reward("sparse", get_task("PushCube-v1"))
    with pytest.raises(ValueError, match="got 'rl4vla', .* PullCube-v1, whose stages are reach, contact, pull, goal"):
        check_reward("rl4vla", get_task("PullCube-v1"))
    for env_id in ("StackCube-v1", "LiftPegUpright-v1"):
        check_reward("rl4vla", get_task(env_id))
