"""The WidowX's experts, for SimplerEnv's own control mode.

`action[:3]` is a step of the controller's target in metres and `action[3:6]` a turn of it in radians (intrinsic angles
about x, y, z), both along the axes of the robot's base, which faces the table turned by 180 degrees; `action[6]` is the
gripper, +1 open and -1 closed. Steps add up in the controller, and the tool follows its target with a lag.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stare_jax.envs.rotations import about_axis, euler_xyz, rotation_matrix, rotation_vector
from stare_jax.stages.geometry import body_axis
from stare_jax.types import Signals

ACTION_DIM = 7
OPEN, CLOSED = 1.0, -1.0
MAX_STEP = 0.05
"""metres; the longest step of the target that an expert commands."""
MAX_TURN = 0.35
"""radians; the largest turn of it."""
POSITION_LAG, ROTATION_LAG = 0.75, 0.88
"""steps by which the tool is behind the controller's target: target - tool = lag x (tool - tool one step before)."""
BASE = np.diag([-1.0, -1.0, 1.0])
"""axes of the robot's base in the world."""


class PickPlace(NamedTuple):
    """The numbers of one task; metres."""

    long_axis: int | None
    """axis of the object's body frame that the fingers close across; None for a cube, where any face will do."""
    hover: float
    """height over the grasp at which the tool lines up."""
    lift: float
    """height to which the object is carried, over where it rested."""
    tolerance: float
    """horizontal distance to the goal at which the object is lowered."""
    min_tool_z: float = 0.0
    """lowest height of the tool: below it the tips of the fingers meet the table, and one of them stops."""


class Memory(NamedTuple):
    phase: str = "hover"
    steps: int = 0
    """taken in this phase."""
    rotation: np.ndarray | None = None
    """`[3, 3]` orientation of the tool that closes across the object, chosen when reaching begins."""
    last_pos: np.ndarray | None = None
    """position `[3]` of the tool one step ago."""
    last_rotation: np.ndarray | None = None
    """its orientation `[3, 3]` then."""


def make_act(task: PickPlace) -> Callable[[Signals, Memory], tuple[np.ndarray, Memory]]:
    """Returns the expert that hovers over the object, grasps it, carries it over its goal, lets go and retreats."""

    def act(signals: Signals, memory: Memory) -> tuple[np.ndarray, Memory]:
        tool = rotation_matrix(signals.tcp_quat)
        if memory.rotation is None:
            memory = memory._replace(rotation=_closing_across(task, signals, tool))
        memory = _next_phase(task, signals, memory, tool)
        position, gripper = _MOVES[memory.phase](task, signals)
        action = _command(signals, memory, tool, position, gripper)
        return action, memory._replace(steps=memory.steps + 1, last_pos=signals.tcp_pos, last_rotation=tool)

    return act


def _closing_across(task: PickPlace, signals: Signals, tool: np.ndarray) -> np.ndarray:
    """Returns the tool's present orientation turned about the vertical, the shorter way, to close across the object."""
    axis = body_axis(signals.obj_quat, 0 if task.long_axis is None else task.long_axis)
    along = np.arctan2(axis[1], axis[0])
    fingers = np.arctan2(tool[1, 1], tool[0, 1])  # They open along the tool's y axis.
    symmetry = np.pi / 2 if task.long_axis is None else np.pi
    wanted = along + np.pi / 2 - fingers
    turn = (wanted + symmetry / 2) % symmetry - symmetry / 2
    return about_axis(np.array([0.0, 0.0, turn])) @ tool


def _command(signals: Signals, memory: Memory, tool: np.ndarray, position: np.ndarray, gripper: float) -> np.ndarray:
    """Returns the action `[7]` that moves the controller's target towards a position `[3]` and `memory.rotation`."""
    step = position - signals.tcp_pos
    turn = rotation_vector(memory.rotation @ tool.T)
    if memory.last_pos is not None:
        step = step - POSITION_LAG * (signals.tcp_pos - memory.last_pos)
        turn = turn - ROTATION_LAG * rotation_vector(tool @ memory.last_rotation.T)
    step *= min(1.0, MAX_STEP / max(np.linalg.norm(step), 1e-9))
    turn *= min(1.0, MAX_TURN / max(np.linalg.norm(turn), 1e-9))
    return np.concatenate([BASE.T @ step, euler_xyz(about_axis(BASE.T @ turn)), [gripper]]).astype(np.float32)


def _next_phase(task: PickPlace, signals: Signals, memory: Memory, tool: np.ndarray) -> Memory:
    """Moves on when the phase has done its work, and back to the beginning where the object was missed or lost."""
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    phase, steps = memory.phase, memory.steps
    aside = np.hypot(*(obj - tcp)[:2])
    off_goal = np.hypot(*(obj - goal)[:2])
    if phase == "hover" and aside < 0.012 and np.linalg.norm(rotation_vector(memory.rotation @ tool.T)) < 0.12:
        phase = "descend"
    elif phase == "descend" and (steps > 7 or aside < 0.012 and abs(tcp[2] - _grasp_height(task, signals)) < 0.008):
        phase = "close"
    elif phase == "close" and steps > 2 and signals.is_grasped:
        phase = "lift"
    elif phase == "lift" and obj[2] > signals.support_z + 0.6 * task.lift:
        phase = "carry"
    elif phase == "carry" and off_goal < task.tolerance:
        phase = "lower"
    elif phase == "lower" and (obj[2] - goal[2] < 0.006 or steps > 5):
        phase = "open"
    elif phase == "open" and steps > 2:
        phase = "retreat"
    is_lost = phase == "close" and steps > 6 or phase == "retreat" and steps > 3 and not signals.success
    is_lost |= phase in ("lift", "carry") and steps > 2 and not signals.is_grasped and np.linalg.norm(obj - tcp) > 0.06
    if is_lost:
        return memory._replace(phase="hover", steps=0, rotation=_closing_across(task, signals, tool))
    return memory if phase == memory.phase else memory._replace(phase=phase, steps=0)


def _grasp_height(task: PickPlace, signals: Signals) -> float:
    return max(float(signals.obj_pos[2]), task.min_tool_z)


def _hover(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _over(signals.obj_pos, _grasp_height(task, signals) + task.hover), OPEN


def _descend(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _over(signals.obj_pos, _grasp_height(task, signals)), OPEN


def _close(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _over(signals.tcp_pos, _grasp_height(task, signals)), CLOSED


def _lift(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _with_object_at(signals, _over(signals.obj_pos, signals.support_z + task.lift)), CLOSED


def _carry(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _with_object_at(signals, _over(signals.goal_pos, signals.support_z + task.lift)), CLOSED


def _lower(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _with_object_at(signals, signals.goal_pos), CLOSED


def _open(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return signals.tcp_pos.astype(np.float64), OPEN


def _retreat(task: PickPlace, signals: Signals) -> tuple[np.ndarray, float]:
    return _over(signals.tcp_pos, signals.goal_pos[2] + 0.12), OPEN


def _over(point: np.ndarray, height: float) -> np.ndarray:
    return np.array([point[0], point[1], height], np.float64)


def _with_object_at(signals: Signals, position: np.ndarray) -> np.ndarray:
    """Returns where the tool is when the object that it holds is at a position."""
    return np.asarray(position, np.float64) + (signals.tcp_pos - signals.obj_pos)


_MOVES: dict[str, Callable[[PickPlace, Signals], tuple[np.ndarray, float]]] = {
    "hover": _hover,
    "descend": _descend,
    "close": _close,
    "lift": _lift,
    "carry": _carry,
    "lower": _lower,
    "open": _open,
    "retreat": _retreat,
}

SPOON = PickPlace(long_axis=0, hover=0.07, lift=0.08, tolerance=0.03, min_tool_z=0.889)
CARROT = PickPlace(long_axis=0, hover=0.07, lift=0.08, tolerance=0.025)
CUBE = PickPlace(long_axis=None, hover=0.07, lift=0.08, tolerance=0.007)
EGGPLANT = PickPlace(long_axis=0, hover=0.08, lift=0.12, tolerance=0.03)
