"""Perturbations of where things are: the object, the robot, and an object that is moved during the episode."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.maniskill.built import OVER, Built, Ongoing
from stare_jax.envs.maniskill.scenes import goal_at_region, goal_on_top
from stare_jax.envs.rotations import turned_about_z

Interval = tuple[float, float]

OUTSIDE: Interval = (0.03, 0.06)
"""metres between the object's start and the nearest place at which training can begin; RL4VLA: 0.03"""
TURN: Interval = (30.0, 60.0)
"""degrees by which WidowX objects are turned about the vertical, to either side; training: 15"""
APART = 0.11
"""metres, at least, between the centres of an object and of what it is put on: a carrot beside the plate is not on it;
RL4VLA: 0.07"""
MOVED: Interval = (0.08, 0.12)
"""metres by which an object is moved during the episode"""
MOVED_AFTER = 5
"""actions before that, as in RL4VLA"""
JOINTS: Interval = (0.08, 0.15)
"""radians by which the arm's joints start elsewhere, to either side, as in RL4VLA"""
LAST_JOINT: Interval = (0.3, 0.6)
"""radians, of the joint that turns the hand, as in RL4VLA"""
TOOL_AWAY, TOOL_LOWER = 0.1, 0.05
"""metres, at most, between the tool's start and its usual one; and downwards"""
_MAX_DRAWS = 10_000


class Box(NamedTuple):
    """A rectangle on the table: ranges of x and y in metres."""

    x: Interval
    y: Interval


class Places(NamedTuple):
    """The places where the object of a task begins, and where else it can lie."""

    trained: Box | None
    """range of its first places; None for the places in `Starts`, each with its jitter."""
    room: Box
    """places where the robot reaches the object and the camera sees it."""
    moved_within: Box
    """places to which it is moved during an episode."""


_SQUARE = Places(Box((-0.1, 0.1), (-0.1, 0.1)), Box((-0.16, 0.1), (-0.16, 0.16)), Box((-0.1, 0.1), (-0.1, 0.1)))
_STACKED = Places(Box((-0.2, 0.2), (-0.3, 0.3)), Box((-0.26, 0.2), (-0.36, 0.36)), Box((-0.2, 0.2), (-0.3, 0.3)))
_TABLE = Places(None, Box((-0.3, -0.03), (-0.16, 0.16)), Box((-0.25, -0.07), (-0.09, 0.09)))
_SINK = Places(None, Box((-0.22, -0.06), (0.14, 0.26)), Box((-0.22, -0.06), (0.14, 0.26)))
PLACES: Mapping[str, Places] = MappingProxyType(
    {
        "PushCube-v1": _SQUARE,
        "PullCube-v1": _SQUARE,
        "LiftPegUpright-v1": _SQUARE,
        "StackCube-v1": _STACKED,
        "PutSpoonOnTableClothInScene-v1": _TABLE,
        "PutCarrotOnPlateInScene-v1": _TABLE,
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": _TABLE,
        "PutEggplantInBasketScene-v1": _SINK,
    }
)


def change_start(built: Built, rng: np.random.Generator) -> Ongoing:
    """Puts the object where no training begins, `OUTSIDE`, and turns it by `TURN` if it is a WidowX's.

    It stays as high as it was. A goal that is marked beside the object moves with it; what it is to be put on stays.
    """
    obj, base = built.scene.objects(built.env)
    old, quat = _pose(obj)
    place = _draw(rng, PLACES[built.env_id].room, lambda xy: _is_free(built, xy) and _is_outside(built, xy))
    if built.starts is not None:
        turn = np.deg2rad(rng.uniform(*TURN)) * rng.choice([-1.0, 1.0])
        quat = turned_about_z(quat, turn)
    shift = np.array([*(place - old[:2]), 0.0])
    _put(obj, old + shift, quat)
    if built.scene.goal is goal_at_region:
        position, orientation = _pose(base)
        _put(base, position + shift, orientation)
    return OVER


def move_object(built: Built, rng: np.random.Generator) -> Ongoing:
    """Moves the object by `MOVED` metres after `MOVED_AFTER` actions, to where it lies as it lay at first.

    The place depends on the first state alone. It is one where training can begin, in the sink one in the same basin.
    The goal stays; the peg's, which is over where it lay, moves with it.
    """
    obj = built.scene.objects(built.env)[0]
    old, quat = _pose(obj)
    box = PLACES[built.env_id].moved_within
    place = _draw(rng, box, lambda xy: _is_free(built, xy) and MOVED[0] <= np.linalg.norm(xy - old[:2]) <= MOVED[1])
    shift = np.array([*(place - old[:2]), 0.0], np.float32)

    def before_action(number: int) -> None:
        if number == MOVED_AFTER:
            _put(obj, old + shift, quat)
            built.reader.shift_start(shift)

    return Ongoing(before_action=before_action)


def change_robot(built: Built, rng: np.random.Generator) -> Ongoing:
    """Turns all joints of the arm by `JOINTS`, the last one by `LAST_JOINT`, to either side.

    Draws are repeated until the tool is within `TOOL_AWAY` of its usual place and not below it by more than
    `TOOL_LOWER`.
    """
    agent, tool = built.env.agent, built.scene.tool(built.env)._objs[0]
    qpos = agent.robot.get_qpos().numpy()[0].copy()
    usual = tool.entity_pose.p.copy()
    num_joints = len(qpos) - 2  # The fingers are the last two.
    low, high = np.tile(np.array(JOINTS)[:, None], num_joints)
    low[-1], high[-1] = LAST_JOINT
    for _ in range(_MAX_DRAWS):
        changed = qpos.copy()
        changed[:num_joints] += rng.uniform(low, high) * rng.choice([-1.0, 1.0], num_joints)
        agent.reset(init_qpos=changed)
        moved = tool.entity_pose.p - usual
        if np.linalg.norm(moved) <= TOOL_AWAY and moved[2] >= -TOOL_LOWER:
            agent.controller.reset()
            return OVER
    raise RuntimeError(f"{built.env_id}: found no pose of the robot in {_MAX_DRAWS} draws")


def outside_of_training(built: Built, place: np.ndarray) -> float:
    """Returns the distance `[m]` of a place `[2]` to the nearest start of training, along x or y; negative inside."""
    trained = PLACES[built.env_id].trained
    if trained is None:
        centres, half = built.starts.places, np.full(2, built.starts.jitter.position)
    else:
        (low_x, high_x), (low_y, high_y) = trained
        centres = np.array([[low_x + high_x, low_y + high_y]]) / 2
        half = np.array([high_x - low_x, high_y - low_y]) / 2
    return float((np.abs(place - centres) - half).max(axis=1).min())


def _is_outside(built: Built, place: np.ndarray) -> bool:
    return OUTSIDE[0] <= outside_of_training(built, place) <= OUTSIDE[1]


def _is_free(built: Built, place: np.ndarray) -> bool:
    """Says whether a place is not too near to what the object is to be put on."""
    base = built.scene.objects(built.env)[1]
    return built.scene.goal is not goal_on_top or bool(np.linalg.norm(place - _pose(base)[0][:2]) >= APART)


def _draw(rng: np.random.Generator, box: Box, fits: Any) -> np.ndarray:
    """Returns a place `[2]` in a box that fits, uniform among all that do."""
    low, high = np.array(box).T
    for _ in range(_MAX_DRAWS):
        if fits(place := rng.uniform(low, high)):
            return place
    raise RuntimeError(f"found no place in {box} in {_MAX_DRAWS} draws")


def _pose(actor: Any) -> tuple[np.ndarray, np.ndarray]:
    pose = actor._objs[0].pose
    return pose.p.copy(), pose.q.copy()


def _put(actor: Any, position: np.ndarray, quat: np.ndarray) -> None:
    """Puts an actor somewhere, at rest."""
    import sapien

    actor._objs[0].set_pose(sapien.Pose(position, quat))
    body = actor._bodies[0]
    if isinstance(body, sapien.physx.PhysxRigidDynamicComponent) and not body.kinematic:
        body.linear_velocity = body.angular_velocity = np.zeros(3)
