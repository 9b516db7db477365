import numpy as np
import pytest

from stare_jax.data.filters import idle_mask, imitation_frames
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DatasetError
from stare_jax.data.writer import DatasetWriter

IDLE = {"translation": 0.01, "rotation": 0.06}


def test_idle_actions_by_hand():
    action = np.array(
        [
            # x,    y,    z,    roll, pitch, yaw,  gripper
            [0.000, 0.00, 0.00, 0.00, 0.00, 0.00, +1],  # the first: nothing before it, nothing moves: idle
            [0.000, 0.00, 0.00, 0.00, 0.00, 0.00, -1],  # the gripper closes
            [0.000, 0.00, 0.00, 0.00, 0.00, 0.00, -1],  # it stays closed: idle
            [0.006, 0.00, 0.008, 0.0, 0.00, 0.00, -1],  # norm 0.01: just idle
            [0.006, 0.00, 0.009, 0.0, 0.00, 0.00, -1],  # norm 0.0108: moves
            [0.000, 0.00, 0.00, 0.05, 0.00, 0.05, -1],  # norm 0.0707: turns
            [0.000, 0.00, 0.00, 0.04, 0.00, 0.04, -1],  # norm 0.0566: idle
            [0.000, 0.00, 0.00, 0.00, 0.00, 0.00, +1],  # the gripper opens
        ]
    )
    expected = [True, False, True, True, False, False, True, False]
    np.testing.assert_array_equal(idle_mask(action, **IDLE), expected)


def test_idle_actions_without_rotation():
    action = np.array([[0.1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(idle_mask(action, **IDLE), [False, True, False])


@pytest.mark.parametrize("shape", [(5, 2), (7,)])
def test_idle_actions_need_the_layout(shape):
    with pytest.raises(ValueError, match="action: got shape .* expected"):
        idle_mask(np.zeros(shape), **IDLE)


@pytest.mark.parametrize("filters", [{}, {"idle": {"translation": 0.01, "rotation": 0.06}}])
def test_imitation_frames(tmp_path, make_trajectory, filters):
    with DatasetWriter(tmp_path, env_id="X", filters=filters) as writer:
        for i in range(2):
            trajectory = make_trajectory(i, length=3)
            trajectory.action[2] = 0.0
            trajectory.action[2, -1] = trajectory.action[1, -1]
            writer.append(trajectory, instruction="push", seed=i, source="expert")
    # Each episode has frames 0 .. 3; the last has no action, and that of frame 2 is idle.
    expected = [0, 1, 4, 5] if filters else [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(imitation_frames(Dataset(tmp_path)), expected)


def test_nothing_to_imitate(tmp_path):
    DatasetWriter(tmp_path, env_id="X").close()
    with pytest.raises(DatasetError, match="no frame to imitate in 0 episodes"):
        imitation_frames(Dataset(tmp_path))
