"""The WidowX's experts, for SimplerEnv's own control mode.

`action[:3]` is a step of the controller's target in metres and `action[3:6]` a turn of it in radians (intrinsic angles
about x, y, z), both along the axes of the robot's base, which faces the table turned by 180 degrees; `action[6]` is the
gripper, +1 open and -1 closed. Steps add up in the controller, and the tool follows its target with a lag: each step
the tool covers 57 % of its distance to the target, of a turn 53 %.

What an expert does follows from where the tool, the object and its goal are, and from whether the object is held.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stare_jax.envs.rotations import about_axis, euler_xyz, rotation_matrix, rotation_vector
from stare_jax.stages.geometry import body_axis
from stare_jax.types import Signals

OPEN, CLOSED = 1.0, -1.0
MAX_STEP = 0.05
"""metres; the longest step of the target that an expert commands."""
MAX_TURN = 0.35
"""radians; the largest turn of it."""
GAIN = 0.4
"""step per metre of distance. The tool that follows its target with a lag then goes beyond a point by 4 % of the way;
from 0.21 on it goes beyond at all, and from 1 on it would oscillate."""
BASE = np.diag([-1.0, -1.0, 1.0])
"""axes of the robot's base in the world."""
TOOL_DOWN = np.array([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
"""orientation `[3, 3]` of a tool that points down; its fingers, which open along its y axis, are as at the start."""
LARGEST_YAW = np.deg2rad(112.5)
"""largest turn of the tool from `TOOL_DOWN` about the vertical. Long objects lie at multiples of 45 degrees in official
starts, and jitter is up to 15: no episode begins near the angle at which the turn changes its sign."""
SLACK = 0.06
"""metres between the tool and an object's centre up to which a raised object counts as held."""


class PickPlace(NamedTuple):
    """The numbers of one task; metres. Heights are those of the object's centre."""

    long_axis: int | None
    """axis of the object's body frame that the fingers close across; None for a cube, where any face will do."""
    hover: float
    """height over the grasp at which the tool lines up."""
    lift: float
    """height over the goal at which the object is carried."""
    tolerance: float
    """horizontal distance to the goal at which the object is let go of."""
    drop: float
    """height over the goal at which it is let go of."""
    min_tool_z: float = 0.0
    """lowest height of the tool: below it the tips of the fingers meet the table, and one of them stops."""


def make_act(task: PickPlace) -> Callable[[Signals, None], tuple[np.ndarray, None]]:
    """Returns the expert that comes down on the object, grasps it, carries it over its goal, lets go and retreats."""

    def act(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
        obj, goal = signals.obj_pos, signals.goal_pos
        off_goal, over_goal = np.hypot(*(obj - goal)[:2]), obj[2] - goal[2]
        is_raised = over_goal > 0.02 and np.linalg.norm(obj - signals.tcp_pos) < SLACK
        # What was let go of a little beside the goal is not taken up again.
        within = task.tolerance if signals.is_grasped else task.tolerance + 0.03
        if over_goal < task.drop and off_goal < within:
            return _let_go(signals), memory
        if signals.is_grasped or is_raised:
            return _carry(task, signals), memory
        return _pick_up(task, signals), memory

    return act


def _pick_up(task: PickPlace, signals: Signals) -> np.ndarray:
    """Comes down on the object in a funnel, open, and closes around it."""
    point = signals.obj_pos.astype(np.float64)
    point[2] = max(point[2], task.min_tool_z)
    rotation = _yawed(_yaw_across(task, signals))
    apart, turn = point - signals.tcp_pos, _turn_to(signals, rotation)
    aside, left = np.hypot(*apart[:2]), np.linalg.norm(turn)
    if aside < 0.015 and abs(apart[2]) < 0.012 and left < 0.25:
        return _command(apart, turn, CLOSED)
    apart[2] += np.clip(3.0 * (aside - 0.01) + 0.3 * (left - 0.15), 0.0, task.hover)
    return _command(apart, turn, OPEN)


def _carry(task: PickPlace, signals: Signals) -> np.ndarray:
    """Lifts the object, moves it over its goal, and comes down in a funnel."""
    to_goal = signals.goal_pos.astype(np.float64) - signals.obj_pos
    off_goal = np.hypot(*to_goal[:2])
    # It moves sideways where it is high enough, or over the goal already.
    is_high, is_near = (-to_goal[2] / task.lift - 0.2) / 0.5, (0.045 - off_goal) / 0.015
    to_goal[:2] *= np.clip(max(is_high, is_near), 0.0, 1.0)
    to_goal[2] += np.clip(2.0 * (off_goal - 0.7 * task.tolerance), -0.01, task.lift)
    return _command(to_goal, _turn_to(signals, _yawed(_yaw(signals))), CLOSED)


def _let_go(signals: Signals) -> np.ndarray:
    """Opens where the tool is, and goes straight up once nothing is held."""
    height = 0.0 if signals.is_grasped else max(0.0, signals.goal_pos[2] + 0.12 - signals.tcp_pos[2])
    return _command(np.array([0.0, 0.0, height]), _turn_to(signals, _yawed(_yaw(signals))), OPEN)


def _yaw(signals: Signals) -> float:
    """Returns the angle about the vertical from `TOOL_DOWN` to the tool, in (-pi, pi]."""
    fingers = body_axis(signals.tcp_quat, 1)
    return float(np.arctan2(fingers[0], -fingers[1]))


def _yaw_across(task: PickPlace, signals: Signals) -> float:
    """Returns the angle about the vertical from `TOOL_DOWN` to a tool that closes across the object."""
    axis = body_axis(signals.obj_quat, task.long_axis or 0)
    along = np.arctan2(axis[1], axis[0])
    if task.long_axis is None:
        return float((along + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    return float(LARGEST_YAW - (LARGEST_YAW - along) % np.pi)


def _yawed(yaw: float) -> np.ndarray:
    return about_axis(np.array([0.0, 0.0, yaw])) @ TOOL_DOWN


def _turn_to(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    """Returns the rotation vector `[3]` from the tool's orientation to another."""
    return rotation_vector(rotation @ rotation_matrix(signals.tcp_quat).T)


def _command(apart: np.ndarray, turn: np.ndarray, gripper: float) -> np.ndarray:
    """Returns the action `[7]` that moves the tool by a vector `[3]` and a rotation vector `[3]` in the end."""
    step, turn = GAIN * apart, GAIN * turn
    step *= min(1.0, MAX_STEP / max(np.linalg.norm(step), 1e-9))
    turn *= min(1.0, MAX_TURN / max(np.linalg.norm(turn), 1e-9))
    return np.concatenate([BASE.T @ step, euler_xyz(about_axis(BASE.T @ turn)), [gripper]]).astype(np.float32)


SPOON = PickPlace(long_axis=0, hover=0.07, lift=0.07, tolerance=0.03, drop=0.02, min_tool_z=0.889)
CARROT = PickPlace(long_axis=0, hover=0.07, lift=0.07, tolerance=0.025, drop=0.01)
CUBE = PickPlace(long_axis=None, hover=0.07, lift=0.05, tolerance=0.008, drop=0.008)
EGGPLANT = PickPlace(long_axis=0, hover=0.08, lift=0.08, tolerance=0.03, drop=0.04)
