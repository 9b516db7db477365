"""The Panda's experts, for `pd_ee_delta_pose`.

`action[:3]` is in units of 0.1 m along the world's axes, `action[3:6]` a rotation vector in units of -0.1 rad
(ManiSkill flips its sign), `action[6]` the gripper, +1 open and -1 closed. Of a command about 40 % is reached within
its step. All positions are in metres; the table's top is at height 0.
"""

from typing import Any

import numpy as np

from stare_jax.envs.maniskill.scenes import CUBE_SIZE, PEG_HALF_LENGTH
from stare_jax.envs.rotations import about_axis, rotation_matrix, rotation_vector
from stare_jax.stages.geometry import body_axis
from stare_jax.types import Signals

ACTION_DIM = 7
OPEN, CLOSED = 1.0, -1.0
FINGER_RANGE = (-0.01, 0.04)
"""metres; places of a finger, from the middle, that the gripper commands -1 and +1 ask for."""
ROTATION_GAIN = 10.0
TOOL_DOWN = np.diag([1.0, -1.0, -1.0])
"""orientation `[3, 3]` of a tool that points down with its fingers closing along the world's y axis."""
PUSH_HEIGHT = 0.02
RISEN = 0.12
"""metres; a height at which the tool is clear of a cube."""
WELL_INSIDE = 0.04
"""metres from the goal's middle, whose radius is 0.1, at which a cube has been pulled far enough."""
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
    """Reaches over the cube to its far side with closed fingers, stops short of it, pulls along -x, and rises.

    A tool that stayed at the cube would pull it out of the goal again with the smallest error of a policy.
    """
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    beyond = tcp[0] - obj[0]
    if obj[0] - goal[0] < WELL_INSIDE:
        return command(signals, (tcp[0], tcp[1], RISEN), gripper=CLOSED), memory
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
    if abs(tcp[0] - obj[0]) < 0.048 and abs(tcp[2] - PUSH_HEIGHT) < 0.025:
        return command(signals, (end_x, obj[1], PUSH_HEIGHT), gripper=CLOSED, limit=0.55)
    stop = (obj[0] + side * 0.042, obj[1], PUSH_HEIGHT)
    return command(signals, stop, gripper=CLOSED, gain=20.0)


def stack_cube(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Grasps cube A along the nearest pair of faces, carries it over cube B, lets go and leaves upwards.

    A grasp is left only close to the goal and taken up again only well away from it, so that no error of a few
    millimetres changes what is done.
    """
    obj, goal = signals.obj_pos, signals.goal_pos
    over_goal, off_goal = obj[2] - goal[2], np.hypot(*(obj - goal)[:2])
    # A finger might come down on the other cube.
    crowding = np.clip((0.09 - off_goal) / 0.02, 0.0, 1.0)
    rotation = _leant_outwards(_best_grasp(signals, goal, crowding), obj, goal)
    if abs(over_goal) < 0.01 and off_goal < (0.015 if signals.is_grasped else 0.03):
        return _leave(signals, rotation, goal[2] + 0.11), memory
    if signals.is_grasped or obj[2] > CUBE_SIZE and _apart(signals, obj) < 0.03:
        return _carry_cube(signals, rotation), memory
    return _pick_up(signals, obj, rotation, crowding=crowding, grip=CLOSED), memory


def _apart(signals: Signals, point: np.ndarray) -> float:
    return float(np.linalg.norm(point - signals.tcp_pos))


def _pick_up(
    signals: Signals, point: np.ndarray, rotation: np.ndarray, *, grip: float, crowding: float = 0.0
) -> np.ndarray:
    """Comes down on a point `[3]` in a funnel, open, and closes around it.

    A turn takes up to 20 steps, most of an episode: the tool turns on its way down, and the last tenths of a radian are
    turned by the fingers that close. Only where the place is crowded the tool turns first.
    """
    apart = point - signals.tcp_pos
    aside, turn = np.hypot(*apart[:2]), _remaining_turn(signals, rotation)
    if aside < 0.014 and abs(apart[2]) < 0.012 and turn < 0.45:
        return command(signals, point, rotation, gripper=grip, gain=14.0)
    above = np.clip(2.5 * (aside - 0.01) + 0.5 * crowding * (turn - 0.25), 0.0, 0.06)
    return command(signals, point + (0, 0, above), rotation, gripper=OPEN, gain=14.0)


def _carry_cube(signals: Signals, rotation: np.ndarray) -> np.ndarray:
    """Lifts the cube beside its goal, and comes down on the goal in a funnel."""
    tcp, obj, goal = signals.tcp_pos, signals.obj_pos, signals.goal_pos
    off_goal = np.hypot(*(obj - goal)[:2])
    target = goal + (tcp - obj)
    target[2] += np.clip(2.5 * (off_goal - 0.012), -0.01, 0.035)
    # A cube that is too low to pass over the other one waits beside it.
    is_high, is_far = (obj[2] - goal[2] + 0.02) / 0.025, (off_goal - 0.07) / 0.05
    target[:2] = tcp[:2] + np.clip(max(is_high, is_far), 0.0, 1.0) * (target[:2] - tcp[:2])
    return command(signals, target, rotation, gripper=CLOSED, gain=14.0)


def _leave(signals: Signals, rotation: np.ndarray, height: float) -> np.ndarray:
    """Opens where the tool is, and goes straight up to a height once nothing is held."""
    tcp = signals.tcp_pos
    target = tcp if signals.is_grasped else (tcp[0], tcp[1], height)
    return command(signals, target, rotation, gripper=OPEN, gain=14.0, limit=0.5)


def _best_grasp(signals: Signals, neighbour: np.ndarray, crowding: float) -> np.ndarray:
    """Returns the orientation, of the four that close on two faces of the cube, that needs the smallest turn.

    Beside a neighbour at `[3]` it is rather one that closes past it, the more so the greater the crowding in [0, 1].
    """
    x_axis = body_axis(signals.obj_quat, 0)
    yaws = np.arctan2(x_axis[1], x_axis[0]) + np.arange(4) * np.pi / 2
    choices = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ TOOL_DOWN for a in yaws]
    towards = (neighbour - signals.obj_pos)[:2]
    towards = crowding * towards / max(np.hypot(*towards), 1e-9)
    return min(choices, key=lambda rotation: _remaining_turn(signals, rotation) + abs(rotation[:2, 1] @ towards))


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


PEG_GRIP = 0.10
"""metres from the centre of the peg to the grip, for leverage. Held closer, the peg does not pivot and is dragged."""
PEG_HALF_WIDTH = 0.025
PEG_SQUEEZE = 0.0075
"""metres that each finger is asked to go into the peg: enough to hold it, and little enough to let it pivot."""
LIGHT_GRIP = 2 * (PEG_HALF_WIDTH - PEG_SQUEEZE - FINGER_RANGE[0]) / (FINGER_RANGE[1] - FINGER_RANGE[0]) - 1


def lift_peg(signals: Signals, memory: None) -> tuple[np.ndarray, None]:
    """Holds the peg lightly near the end on the far side of the robot, swings it up about its other end, lets go.

    The peg pivots between the fingers, so the tool hardly has to turn.
    """
    axis, obj = body_axis(signals.obj_quat, 0), signals.obj_pos
    tilt, held_point = np.arccos(np.clip(axis[2], -1.0, 1.0)), obj + PEG_GRIP * axis
    if tilt < 0.05 and obj[2] - PEG_HALF_LENGTH < 0.004:
        return _leave(signals, rotation_matrix(signals.tcp_quat), 0.3), memory
    is_raised = obj[2] > PEG_HALF_WIDTH + 0.01
    if signals.is_grasped or is_raised and _apart(signals, held_point) < 0.03:
        return _swing(signals, axis), memory
    return _pick_up(signals, held_point, _leant_outwards(TOOL_DOWN, held_point), grip=LIGHT_GRIP), memory


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
