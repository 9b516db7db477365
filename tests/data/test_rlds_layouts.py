"""Actions of RLDS data sets by hand; the import itself is in tests/launch/test_import_rlds.py."""

import numpy as np
import pytest

from stare_jax.data.rlds_layouts import (
    binarize_gripper,
    reached_actions,
    recorded_actions,
    recorded_layout,
)


@pytest.mark.parametrize(
    ("gripper", "expected"),
    [
        # From the back: 0.02 is closed; 0.5 is about to close; 0.97 is open; 0.3 is about to open.
        ([0.3, 0.97, 0.5, 0.02], [1, 1, 0, 0]),
        # Nothing is decided at the end, so that the last value stays, and what lies before it inherits that.
        ([0.0, 0.4, 0.6], [0, 0.6, 0.6]),
        # The bounds themselves lie between.
        ([0.95, 0.05, 1.0], [1, 1, 1]),
        ([0.05, 0.95, 0.0], [0, 0, 0]),
        ([], []),
    ],
)
def test_gripper_is_what_it_is_about_to_become(gripper, expected):
    gripper = np.array(gripper, np.float32)
    before = gripper.copy()
    np.testing.assert_array_equal(binarize_gripper(gripper), np.array(expected, np.float32))
    np.testing.assert_array_equal(gripper, before)


def test_bridge_actions_are_what_the_arm_reached():
    # The states of five steps; x moves by 1, 2, 4, 8, yaw past pi: 3.1 -> -3.1 counts as -6.2.
    state = np.zeros((5, 7), np.float32)
    state[:, 0] = [0, 1, 3, 7, 15]
    state[:, 5] = [0, 0, 3.1, -3.1, 0]
    action = np.full((5, 7), 9.0, np.float32)  # what was commanded is not looked at, but for the gripper
    action[:, 6] = [0.0, 1.0, 0.5, 0.0, 1.0]
    got = reached_actions(state, action)
    # Step 0 is left out, then come steps 1, 2, 3; the gripper of step 2 is about to close.
    assert got.first == 1 and got.action.dtype == np.float32
    np.testing.assert_allclose(got.action[:, 0], [2, 4, 8])
    np.testing.assert_allclose(got.action[:, 5], [3.1, -6.2, 3.1], rtol=1e-6)
    np.testing.assert_array_equal(got.action[:, 1:5], 0)
    np.testing.assert_array_equal(got.action[:, 6], [1, 0, 0])


def test_the_last_step_still_says_what_the_gripper_is_about_to_become():
    state, action = np.zeros((3, 7), np.float32), np.zeros((3, 7), np.float32)
    action[:, 6] = [0.0, 0.5, 1.0]
    assert reached_actions(state, action).action[:, 6].tolist() == [1.0]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_too_short_for_an_action(num_steps):
    steps = np.zeros((num_steps, 7), np.float32)
    assert reached_actions(steps, steps).action.shape == (0, 7)
    assert len(recorded_actions(steps, steps, closed=0.0, opened=1.0).action) == max(0, num_steps - 1)


@pytest.mark.parametrize(
    ("closed", "opened", "gripper"),
    [
        (0.0, 1.0, [1.0, 0.5, 0.0]),
        (1.0, 0.0, [0.0, 0.5, 1.0]),
        (-1.0, 1.0, [1.0, 0.0, -1.0]),
        (1.0, -1.0, [-1.0, 0.0, 1.0]),
        (0.0, 0.04, [0.04, 0.02, 0.0]),
    ],
)
def test_recorded_actions_open_with_1_and_close_with_0(closed, opened, gripper):
    action = np.arange(28, dtype=np.float32).reshape(4, 7)
    action[:, 6] = [*gripper, opened]
    got = recorded_actions(np.zeros((4, 0), np.float32), action, closed=closed, opened=opened)
    assert got.first == 0
    np.testing.assert_array_equal(got.action[:, :6], action[:3, :6])
    # The last step's action means nothing, its gripper neither: the one before it is closed, so 0.5 is about to close.
    np.testing.assert_array_equal(got.action[:, 6], [1, 0, 0])


def test_what_is_not_as_the_layout_says_is_named():
    state, action = np.zeros((4, 7), np.float32), np.zeros((4, 7), np.float32)
    with pytest.raises(ValueError, match=r"state: got shape \[4, 8\], expected \[T, 7\]"):
        reached_actions(np.zeros((4, 8), np.float32), action)
    with pytest.raises(ValueError, match=r"action: got shape \[4, 6\], expected \[T, 7\]"):
        reached_actions(state, action[:, :6])
    with pytest.raises(ValueError, match=r"action: got shape \[4, 6\], expected \[T, 7\]"):
        recorded_actions(state, action[:, :6], closed=0.0, opened=1.0)
    action[1, 6] = -1.0
    with pytest.raises(ValueError, match="gripper: got -1 to 0, expected 0, closed, to 1, open"):
        recorded_actions(state, action, closed=0.0, opened=1.0)
    action[:, 6] = [1.0, 0.0, 0.0, 0.0]  # RT-1: close, and hold on
    message = "gripper: got 0 in 2 of 3 steps, as relative commands have it, expected positions, 1, closed, to -1, open"
    with pytest.raises(ValueError, match=message):
        recorded_actions(state, action, closed=1.0, opened=-1.0)
    with pytest.raises(ValueError, match="gripper: got 1 both for closed and for open, expected two numbers"):
        recorded_layout(image="image", action=("action",), instruction="text", state=None, closed=1.0, opened=1.0)
