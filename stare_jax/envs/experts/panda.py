"""The Panda's experts, for `pd_ee_delta_pose`.

`action[:3]` is in units of 0.1 m along the world's axes, `action[3:6]` a rotation vector in units of -0.1 rad
(ManiSkill flips its sign), `action[6]` the gripper, +1 open and -1 closed. Of a command about 40 % is reached within
its step. All positions are in metres; the table's top is at height 0.
"""

from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.maniskill.scenes import CUBE_SIZE, PEG_HALF_LENGTH
from stare_jax.envs.rotations import about_axis, rotation_matrix, rotation_vector
from stare_jax.stages.geometry import body_axis
from stare_jax.types import Signals

ACTION_DIM = 7
OPEN, CLOSED, LIGHT_GRIP = 1.0, -1.0, 0.1
ROTATION_GAIN = 10.0
TOOL_DOWN = np.diag([1.0, -1.0, -1.0])
"""orientation `[3, 3]` of a tool that points down with its fingers closing along the world's y axis."""
PUSH_HEIGHT = 0.02
METRES_PER_UNIT = 0.1
BASE = np.array([-0.615, 0.0])
REACH = 0.793
"""horizontal distance from the robot's base, in metres, up to which the tool can point straight down on the table."""
WRIST_TO_TOOL = 0.21
"""metres; a tool that leans outwards reaches further by the sine of the angle times this."""
MAX_LEAN = 0.6


def command(
    signals: Signals,
    position: Any,
    rotation: np.ndarray | None = None,
    *,
    gripper: float,
    gain: float = 10.0,
    limit: float = 1.0,
) -> np.ndarray:
    """Returns the action `[7]` that moves the tool towards a position `[3]` and an orientation `[3, 3]`.

    Args:
        rotation: None commands no rotation at all: where the tool's few degrees of drift do not matter, demonstrations
            in which rotation stands still leave a policy nothing to learn there.
        gripper: the gripper command.
        gain: command per metre of distance.
        limit: the largest component of the translation command; longer ones keep their direction.
    """
    action = np.empty(ACTION_DIM, np.float32)
    translation = gain * (np.asarray(position, np.float64) - signals.tcp_pos)
    translation *= min(1.0, limit / max(np.abs(translation).max(), 1e-9))
    action[:3] = _within_reach(signals, translation)
    action[3:6] = 0.0
    if rotation is not None:
        turn = ROTATION_GAIN * rotation_vector(rotation @ rotation_matrix(signals.tcp_quat).T)
        action[3:6] = -turn / max(1.0, np.linalg.norm(turn))
    action[6] = gripper
    return action


def _within_reach(signals: Signals, translation: np.ndarray) -> np.ndarray:
    """Returns the translation command `[3]`, pulled in where it points beyond the reach of the tool as it leans.

    The arm does not go as far as it can towards such a point: it holds its pose.
    """
    tcp = signals.tcp_pos[:2]
    from_base = tcp - BASE + METRES_PER_UNIT * translation[:2]
    distance = np.hypot(*from_base)
    leaning = body_axis(signals.tcp_quat, 2)[:2] @ from_base / max(distance, 1e-9)
    reach = REACH + WRIST_TO_TOOL * leaning
    if distance <= reach:
        return translation
    inside = BASE + from_base * reach / distance
    return np.append((inside - tcp) / METRES_PER_UNIT, translation[2])


def push_cube(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Goes behind the cube with closed fingers, over it if need be, stops short of it, and pushes along x."""
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    behind = obj[0] - tcp[0]
    if behind > 0.02 and abs(tcp[1] - obj[1]) < 0.02 and tcp[2] < 0.05:
        return _push_along_x(signals, -1.0, goal[0] - 0.05), memory
    target = np.array([obj[0] - 0.06, obj[1], PUSH_HEIGHT])
    is_beside = behind < 0.045 and abs(tcp[1] - obj[1]) < 0.06
    is_above = behind < 0.05 and tcp[2] > 0.09
    if is_beside or is_above:
        target[2] = 0.09
    elif np.hypot(*(target - tcp)[:2]) > 0.03:
        target[2] = 0.05
    return command(signals, target, gripper=CLOSED, gain=20.0), memory


def pull_cube(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Reaches over the cube to its far side with closed fingers, stops short of it, and pulls along -x."""
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    beyond = tcp[0] - obj[0]
    if beyond > 0.02 and abs(tcp[1] - obj[1]) < 0.02 and tcp[2] < 0.05:
        return _push_along_x(signals, 1.0, goal[0] - 0.02), memory
    target = np.array([obj[0] + 0.055, obj[1], PUSH_HEIGHT])
    if np.hypot(*(target - tcp)[:2]) > 0.02:
        target[2] = 0.08 if beyond < 0.035 else 0.05
    return command(signals, target, gripper=CLOSED, gain=20.0), memory


def _push_along_x(signals: Signals, side: float, end_x: float) -> np.ndarray:
    """Returns the action of a tool that is in line with the cube, at x beyond it (side 1) or before it (side -1).

    It first stops within reach of the cube without touching it, and pushes slowly enough not to knock it away, so that
    every stage of the task lasts at least one step.
    """
    tcp, obj = signals.tcp_pos, signals.obj_pos
    is_at_cube = abs(tcp[0] - obj[0]) < 0.048 and abs(tcp[2] - PUSH_HEIGHT) < 0.025
    if is_at_cube or signals.is_contact:
        return command(signals, (end_x, obj[1], PUSH_HEIGHT), gripper=CLOSED, limit=0.55)
    stop = (obj[0] + side * 0.042, obj[1], PUSH_HEIGHT)
    return command(signals, stop, gripper=CLOSED, gain=20.0)


class StackMemory(NamedTuple):
    phase: str = "reach"
    steps: int = 0
    """taken in this phase."""
    rotation: np.ndarray | None = None
    """orientation of the tool for this cube, chosen in the first state."""


def stack_cube(signals: Signals, memory: StackMemory) -> tuple[np.ndarray, StackMemory]:
    """Grasps cube A along the nearest pair of faces, carries it over cube B and lets go."""
    if memory.rotation is None:
        memory = memory._replace(rotation=_leant_outwards(_nearest_grasp(signals), signals.obj_pos, signals.goal_pos))
    memory = _next_stack_phase(signals, memory)
    action = _STACK_MOVES[memory.phase](signals, memory.rotation)
    return action, memory._replace(steps=memory.steps + 1)


def _nearest_grasp(signals: Signals) -> np.ndarray:
    """Returns the orientation, of the four that close on two faces of the cube, that needs the smallest turn."""
    x_axis = body_axis(signals.obj_quat, 0)
    yaws = np.arctan2(x_axis[1], x_axis[0]) + np.arange(4) * np.pi / 2
    choices = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ TOOL_DOWN for a in yaws]
    return min(choices, key=lambda rotation: _remaining_turn(signals, rotation))


def _leant_outwards(rotation: np.ndarray, *places: np.ndarray) -> np.ndarray:
    """Returns the orientation `[3, 3]`, turned about the direction in which the fingers close as far as it takes for
    the tool to reach the places `[3]`."""
    outwards = max((place[:2] - BASE for place in places), key=lambda offset: np.hypot(*offset))
    distance = np.hypot(*outwards)
    beyond = distance - REACH + 0.01  # 1 cm to spare
    if beyond <= 0.0:
        return rotation
    closing = rotation[:, 1]
    gain = WRIST_TO_TOOL * (closing[0] * outwards[1] - closing[1] * outwards[0]) / distance
    # Of fingers that close outwards, no lean about them reaches further.
    lean = np.sign(gain) * min(beyond / max(abs(gain), 1e-9), MAX_LEAN)
    return about_axis(lean * closing) @ rotation


def _remaining_turn(signals: Signals, rotation: np.ndarray) -> float:
    """Returns the angle from the tool's orientation to the one wanted."""
    return float(np.linalg.norm(rotation_vector(rotation @ rotation_matrix(signals.tcp_quat).T)))


def _next_stack_phase(signals: Signals, memory: StackMemory) -> StackMemory:
    """Moves on when the phase has done its work, and back to reaching where the grasp fails.

    The last tenths of a radian are turned on the way down, and in the end by the fingers that close: a turn takes up to
    20 steps, most of an episode.
    """
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    phase, steps, rotation = memory.phase, memory.steps, memory.rotation
    aside = np.hypot(*(obj - tcp)[:2])
    if phase == "reach" and aside < 0.01 and _remaining_turn(signals, rotation) < 0.2 and abs(tcp[2] - obj[2]) < 0.008:
        phase = "grasp"
    elif phase == "grasp" and signals.is_grasped and steps > 0:
        phase = "carry"
    elif phase == "grasp" and steps > 6 or phase == "carry" and np.linalg.norm(obj - tcp) > 0.04:
        phase = "reach"
    elif phase == "carry" and np.hypot(*(obj - goal)[:2]) < 0.012 and obj[2] - goal[2] < 0.006:
        phase = "release"
    elif phase == "release" and steps > 1:
        phase = "leave"
    return memory if phase == memory.phase else memory._replace(phase=phase, steps=0)


def _stack_reach(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    tcp, obj = signals.tcp_pos, signals.obj_pos
    is_over = np.hypot(*(obj - tcp)[:2]) < 0.015 and _remaining_turn(signals, rotation) < 0.3
    return command(signals, obj + (0, 0, 0 if is_over else 0.05), rotation, gripper=OPEN, gain=14.0)


def _stack_grasp(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    obj = signals.obj_pos
    return command(signals, (obj[0], obj[1], CUBE_SIZE / 2), rotation, gripper=CLOSED, gain=14.0)


def _stack_carry(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    """Lifts first, then approaches from above, and lowers over the goal."""
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    target = goal + (tcp - obj)
    aside = np.hypot(*(obj - goal)[:2])
    target[2] += 0.035 if aside > 0.03 else 0.001
    if obj[2] < goal[2] + 0.005 and aside > 0.05:
        is_low = obj[2] < goal[2] - CUBE_SIZE / 2
        target[:2] = tcp[:2] if is_low else 0.3 * tcp[:2] + 0.7 * target[:2]
    return command(signals, target, rotation, gripper=CLOSED, gain=14.0)


def _stack_release(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    return command(signals, signals.tcp_pos, rotation, gripper=OPEN)


def _stack_leave(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    tcp, goal = signals.tcp_pos, signals.goal_pos
    return command(signals, (tcp[0], tcp[1], goal[2] + 0.11), rotation, gripper=OPEN, gain=14.0, limit=0.5)


_STACK_MOVES = {
    "reach": _stack_reach,
    "grasp": _stack_grasp,
    "carry": _stack_carry,
    "release": _stack_release,
    "leave": _stack_leave,
}


class LiftMemory(NamedTuple):
    phase: str = "reach"
    steps: int = 0


PEG_GRIP = 0.10
"""metres from the centre of the peg to the grip, for leverage. Held closer, the peg does not pivot and is dragged."""
PEG_HALF_WIDTH = 0.025


def lift_peg(signals: Signals, memory: LiftMemory) -> tuple[np.ndarray, LiftMemory]:
    """Holds the peg lightly near the end on the far side of the robot and swings it up about its other end.

    The peg pivots between the fingers, so the tool hardly has to turn.
    """
    axis = body_axis(signals.obj_quat, 0)
    phase, steps = memory
    held_point = signals.obj_pos + PEG_GRIP * axis
    if phase == "reach" and np.linalg.norm(held_point - signals.tcp_pos) < 0.012:
        phase, steps = "grasp", 0
    elif phase == "grasp" and signals.is_grasped and steps > 0:
        phase, steps = "swing", 0
    elif phase == "grasp" and steps > 7:
        phase, steps = "reach", 0
    rotation = _leant_outwards(TOOL_DOWN, held_point)
    if phase == "reach":
        above = 0.0 if np.hypot(*(held_point - signals.tcp_pos)[:2]) < 0.03 else 0.07
        action = command(signals, held_point + (0, 0, above), rotation, gripper=OPEN)
    elif phase == "grasp":
        action = command(signals, signals.tcp_pos, rotation, gripper=CLOSED)
    else:
        action = _swing(signals, axis)
    return action, LiftMemory(phase, steps + 1)


def _swing(signals: Signals, axis: np.ndarray) -> np.ndarray:
    """Moves the tool along the arc about the peg's foot, ahead of the peg's own elevation."""
    tcp, obj = signals.tcp_pos, signals.obj_pos
    error = np.pi / 2 - np.arctan2(axis[2], axis[0])
    if abs(error) < 0.07:
        target = tcp + (0, 0, PEG_HALF_LENGTH - obj[2])
    else:
        foot = obj - PEG_HALF_LENGTH * axis
        from_foot = tcp - foot
        radius = np.hypot(from_foot[0], from_foot[2])
        elevation = np.arctan2(from_foot[2], from_foot[0]) + np.clip(error, -0.4, 0.4)
        foot_height = PEG_HALF_WIDTH * max(axis[0], 0.0)  # of the end of the axis when the peg's edge is on the table
        target = np.array([foot[0] + radius * np.cos(elevation), foot[1], foot_height + radius * np.sin(elevation)])
    pitch = -np.clip(error, -0.3, 0.3)
    turn = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    return command(signals, target, turn @ rotation_matrix(signals.tcp_quat), gripper=LIGHT_GRIP, gain=12.0)
