"""Closed-loop experts: pure functions of `Signals` and a small memory, in the policy's own action space.

They look at every state anew, so they recover from whatever was executed instead of what they decided: demonstrations
with execution noise keep clean labels. Written for `pd_ee_delta_pose` of the Panda: `action[:3]` in units of 0.1 m
along the world's axes, `action[3:6]` a rotation vector in units of -0.1 rad (ManiSkill flips its sign), `action[6]` the
gripper, +1 open and -1 closed. Of a command about 40 % is reached within its step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stare_jax.types import Signals

ACTION_DIM = 7
ROTATION_GAIN = 10.0
OPEN, CLOSED = 1.0, -1.0
TOOL_DOWN = np.diag([1.0, -1.0, -1.0])
"""orientation `[3, 3]` of a tool that points down with its fingers closing along the world's y axis."""


class Expert(NamedTuple):
    """One environment's expert; loop over environments, or over rows of a batch."""

    init: Callable[[], Any]
    """() -> the memory of an episode that begins."""
    act: Callable[[Signals, Any], tuple[np.ndarray, Any]]
    """(signals of one state, memory) -> (action float32 `[A]`, memory)."""
    noise_range: np.ndarray
    """float32 `[A]`: half the range of each action dimension that execution noise applies to, 0 elsewhere."""


def make_expert(env_id: str) -> Expert:
    """Returns the expert of a task.

    Raises:
        ValueError: there is none for this task.
    """
    if env_id not in _EXPERTS:
        raise ValueError(f"env_id: got {env_id!r}, expected one of {sorted(_EXPERTS)}")
    return _EXPERTS[env_id]


def execution_noise(
    rng: np.random.Generator, scale: float, noise_range: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `perturb(action [B, A], is_first [B])`: the action with Gaussian noise, clipped to its range.

    Args:
        rng: drawn from at every call.
        scale: standard deviation as a fraction of `noise_range`; 0 leaves every action as it is.
        noise_range: `[A]`, an expert's.
    """
    noisy = noise_range > 0

    def perturb(action: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        del is_first
        drawn = action + scale * noise_range * rng.standard_normal(action.shape)
        return np.where(noisy, np.clip(drawn, -noise_range, noise_range), action).astype(np.float32)

    return perturb


def _command(
    signals: Signals,
    position: Any,
    *,
    gripper: float,
    rotation: np.ndarray | None = None,
    gain: float = 10.0,
    limit: float = 1.0,
) -> np.ndarray:
    """Returns the action that moves the tool towards a position `[3]` and, if given, an orientation `[3, 3]`.

    Args:
        gripper: the gripper command.
        gain: command per metre of distance, in action units.
        limit: the largest component of the translation command; longer ones keep their direction.
    """
    action = np.zeros(ACTION_DIM, np.float32)
    translation = gain * (np.asarray(position, np.float64) - signals.tcp_pos)
    action[:3] = translation * min(1.0, limit / max(np.abs(translation).max(), 1e-9))
    if rotation is not None:
        turn = ROTATION_GAIN * rotation_vector(rotation @ rotation_matrix(signals.tcp_quat).T)
        action[3:6] = -turn / max(1.0, np.linalg.norm(turn))
    action[6] = gripper
    return action


def rotation_matrix(quat: np.ndarray) -> np.ndarray:
    """Returns the matrix `[3, 3]` of a unit quaternion, wxyz."""
    w, x, y, z = (float(part) for part in quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Returns axis times angle `[3]` of a rotation matrix, for angles below pi."""
    angle = np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1.0, 1.0))
    if angle < 1e-6:
        return np.zeros(3)
    antisymmetric = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    return antisymmetric * angle / (2 * np.sin(angle) + 1e-12)


# ---- PushCube, PullCube ----------------------------------------------------------------------------------------------


def _push_cube(signals: Signals, is_pushing: bool) -> tuple[np.ndarray, bool]:
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    behind = np.array([obj[0] - 0.06, obj[1], 0.02])
    to_behind = behind - tcp
    is_pushing = is_pushing or bool(np.linalg.norm(to_behind) < 0.015)
    if is_pushing:
        return _command(signals, (goal[0] - 0.05, obj[1], 0.02), rotation=TOOL_DOWN, gripper=CLOSED), is_pushing
    if np.linalg.norm(to_behind[:2]) > 0.03:
        behind[2] = 0.05
    is_beside = tcp[0] > obj[0] - 0.045 and abs(tcp[1] - obj[1]) < 0.06
    is_above = tcp[2] > 0.09 and tcp[0] > obj[0] - 0.05
    if is_beside or is_above:
        behind[2] = 0.09
    return _command(signals, behind, rotation=TOOL_DOWN, gripper=CLOSED), is_pushing


_EXPERTS = {
    "PushCube-v1": Expert(lambda: False, _push_cube, np.array([1, 1, 1, 0, 0, 0, 0], np.float32)),
}
