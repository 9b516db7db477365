"""A gripper picks up a peg and stands it on its end, in a vertical plane: the toy of the lift-upright family.

An action moves the gripper by up to `MAX_STEP` metres along x and z, turns it by up to `MAX_TURN` radians, and opens or
closes it. A held peg moves and turns with it, and the floor pushes both up where the peg would go through; a peg that
is let go stands if it is upright, and falls flat otherwise. Stages, costs and potentials are those of
`LiftPegUpright-v1` with thresholds of this size. Positions are (x, z), metres, z upwards.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.toys.drawing import OBJECT, Shape, box
from stare_jax.envs.toys.gripper import (
    HOLDING_OPENING,
    VIEW,
    WORKSPACE,
    Gripper,
    approach,
    finger_opening,
    floor_shape,
    gripper_shapes,
    move_fingers,
    move_gripper,
)
from stare_jax.envs.toys.vec_env import Toy, array_module, bounded
from stare_jax.stages.spec import TaskSpec
from stare_jax.stages.tasks import get_task
from stare_jax.types import Array, NormStats, Signals

ENV_ID = "ToyLift-v0"
INSTRUCTION = "lift the peg upright"
HORIZON = 40
ACTION_DIM = 4
STATE_DIM = 8

MAX_STEP = 0.015
MAX_TURN = 0.25
"""Radians, with steps of `MAX_STEP`; shorter steps turn less."""
PEG_HALF_LENGTH = 0.05
PEG_RADIUS = 0.01
GRASP_DISTANCE = 0.015
"""Distance from the peg's axis within which closing fingers hold it."""
SUCCESS_TILT = 0.1
SUCCESS_HEIGHT = 0.01
START_HEIGHT = (0.05, 0.09)
START_DISTANCE = 0.08


class LiftState(NamedTuple):
    """State of an episode."""

    gripper: Gripper
    peg: Array
    """`[2]` its centre."""
    angle: Array
    """radians between the peg and the floor."""
    start_x: Array
    """x of the peg at the start."""


def task_spec() -> TaskSpec:
    """Returns the stages of the lift-upright family with thresholds for this plane."""
    peg = get_task("LiftPegUpright-v1")
    params = dataclasses.replace(peg.params, delta_reach=0.03, h_min=0.03, d_reach=0.05, h_lift=PEG_HALF_LENGTH)
    return dataclasses.replace(peg, env_id=ENV_ID, instruction=INSTRUCTION, params=params)


def norm_stats() -> NormStats:
    """Returns the ranges of actions and states."""
    return NormStats(
        action_q01=np.full(ACTION_DIM, -1.0, np.float32),
        action_q99=np.full(ACTION_DIM, 1.0, np.float32),
        action_mask=np.ones(ACTION_DIM, bool),
        state_q01=np.array([-WORKSPACE, 0.0, 0.0, 0.0, -WORKSPACE, 0.0, -1.0, -1.0], np.float32),
        state_q99=np.array([WORKSPACE, WORKSPACE, 1.0, 1.0, WORKSPACE, WORKSPACE, 1.0, 1.0], np.float32),
    )


def reset_state(seed: Array) -> LiftState:
    """Draws an episode's start: peg flat on the floor near the centre, open gripper above it or beside it."""
    draw = jax.random.uniform(jax.random.key(seed), (3,), jnp.float32)
    x = 0.08 * (draw[0] - 0.5)
    height = START_HEIGHT[0] + (START_HEIGHT[1] - START_HEIGHT[0]) * draw[1]
    position = jnp.array([x + START_DISTANCE * (2 * draw[2] - 1), height])
    gripper = Gripper(position, jnp.float32(1.0), jnp.array(False))
    return LiftState(gripper, jnp.array([x, PEG_RADIUS]), jnp.float32(0.0), x)


def step_state(state: LiftState, action: Array, *, max_step: Array | float = MAX_STEP) -> LiftState:
    """Moves the gripper by `max_step` times the first two numbers of the action, turns it by the third, and moves its
    fingers by the fourth."""
    action = jnp.clip(action, -1.0, 1.0)
    displacement, turn = max_step * action[:2], max_step / MAX_STEP * MAX_TURN * action[2]
    opening = move_fingers(state.gripper.opening, action[3])

    def is_inside(position):
        return jnp.linalg.norm(position - _nearest_point(state, position)) < GRASP_DISTANCE

    free = state._replace(gripper=approach(state.gripper, displacement, opening, is_inside=is_inside))
    carried = _carry(state, displacement, turn, opening)
    moved = jax.tree.map(lambda a, b: jnp.where(state.gripper.is_holding, a, b), carried, free)
    return jax.tree.map(lambda a, b: jnp.where(moved.gripper.is_holding, a, b), moved, _let_go(moved))


def _carry(state: LiftState, displacement: Array, turn: Array, opening: Array) -> LiftState:
    """Moves the gripper and the peg in it, both raised where the floor is in the way."""
    position = move_gripper(state.gripper.position, displacement)
    arm = state.peg - state.gripper.position
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    angle = state.angle + turn
    peg = position + jnp.stack([cos * arm[0] - sin * arm[1], sin * arm[0] + cos * arm[1]])
    raised = jnp.stack([0.0, jnp.maximum(0.0, _standing_height(angle) - peg[1])])
    gripper = Gripper(position + raised, opening, opening < HOLDING_OPENING)
    return state._replace(gripper=gripper, peg=peg + raised, angle=angle)


def _let_go(state: LiftState) -> LiftState:
    """Puts the peg on the floor, standing where it is upright."""
    stands = _tilt(state.angle) < SUCCESS_TILT
    angle = jnp.where(stands, state.angle, 0.0)
    return state._replace(peg=state.peg.at[1].set(_standing_height(angle)), angle=angle)


def _standing_height(angle: Array) -> Array:
    """Returns the height of the centre of a peg whose lower end is on the floor."""
    return PEG_RADIUS + PEG_HALF_LENGTH * jnp.abs(jnp.sin(angle))


def _tilt(angle: Array) -> Array:
    """Returns the angle between the peg and the vertical, in [0, pi/2]."""
    return jnp.arctan2(jnp.abs(jnp.cos(angle)), jnp.abs(jnp.sin(angle)))


def _nearest_point(state: LiftState, position: Array) -> Array:
    """Returns the point `[2]` of the peg's axis that is nearest to a position."""
    axis = jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle)])
    along = jnp.clip(jnp.dot(position - state.peg, axis), -PEG_HALF_LENGTH, PEG_HALF_LENGTH)
    return state.peg + along * axis


def observe_state(state: LiftState) -> tuple[Array, Signals]:
    """Returns the observed state `[S]` (gripper, opening, whether it holds, peg, cosine and sine of its angle) and the
    signals."""
    gripper = state.gripper
    is_up = _tilt(state.angle) < SUCCESS_TILT
    is_low = jnp.abs(state.peg[1] - PEG_RADIUS - PEG_HALF_LENGTH) < SUCCESS_HEIGHT
    signals = Signals(
        tcp_pos=_in_space(gripper.position),
        tcp_quat=jnp.array([1.0, 0.0, 0.0, 0.0]),
        obj_pos=_in_space(state.peg),
        obj_quat=_quaternion(state.angle),
        grasp_pos=_in_space(_nearest_point(state, gripper.position)),
        goal_pos=jnp.stack([state.start_x, 0.0, PEG_RADIUS + PEG_HALF_LENGTH]),
        goal_quat=_quaternion(jnp.float32(np.pi / 2)),
        is_grasped=gripper.is_holding,
        is_contact=gripper.is_holding,
        success=is_up & is_low,
        support_z=jnp.float32(PEG_RADIUS),
    )
    fingers = jnp.stack([gripper.opening, gripper.is_holding.astype(jnp.float32)])
    direction = jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle)])
    return jnp.concatenate([gripper.position, fingers, state.peg, direction]), signals


def _in_space(position: Array) -> Array:
    """Returns (x, 0, z)."""
    return jnp.stack([position[0], jnp.zeros_like(position[0]), position[1]])


def _quaternion(angle: Array) -> Array:
    """Returns the rotation that takes the x axis to (cos, 0, sin) of the angle."""
    return jnp.stack([jnp.cos(angle / 2), jnp.zeros_like(angle), -jnp.sin(angle / 2), jnp.zeros_like(angle)])


CENTRED = 0.006
"""Metres from the peg's axis at which the expert closes the fingers."""
TURNING_HEIGHT = 0.035
"""Metres above rest from which the expert turns the peg."""
CLEARANCE = 0.01
"""Metres between floor and peg while the expert turns it."""


def expert_action(signals: Signals, *, speed: Array | float = 1.0, max_step: Array | float = MAX_STEP) -> Array:
    """Acts in closed loop: goes to the nearest point of the peg, closes, lifts, turns, and lowers the upright peg.

    Args:
        signals: leaves `[B, ...]`, of NumPy or JAX.
        speed: fraction of the largest step that it uses.
        max_step: metres, the largest step.

    Returns:
        float32 `[B, 4]` in [-1, 1].
    """
    gripper, peg, nearest = (x[:, ::2] for x in (signals.tcp_pos, signals.obj_pos, signals.grasp_pos))
    xp = array_module(gripper)
    zeros, ones = xp.zeros_like(gripper[:, 0]), xp.ones_like(gripper[:, 0])
    is_held = signals.is_grasped
    to_peg = nearest - gripper
    is_around = xp.linalg.norm(to_peg, axis=-1) < CENTRED

    cos = 1.0 - 2.0 * signals.obj_quat[:, 2] ** 2
    sin = -2.0 * signals.obj_quat[:, 0] * signals.obj_quat[:, 2]
    # To the nearer of the two ways up.
    turn = xp.arctan2(xp.where(sin < 0, -cos, cos), xp.abs(sin))
    is_up = xp.abs(turn) < 0.5 * SUCCESS_TILT
    height = peg[:, 1] - PEG_RADIUS
    rise = PEG_HALF_LENGTH + xp.where(is_up, 0.0, CLEARANCE) - height
    turn = xp.where(is_held & (height > TURNING_HEIGHT), turn * (MAX_STEP / (MAX_TURN * max_step)), zeros)

    move = xp.where(is_held[:, None], xp.stack([zeros, rise], axis=-1), to_peg) / max_step
    fingers = xp.where(is_held | is_around, -ones, ones)
    move = bounded(xp.concatenate([move, turn[:, None]], axis=-1), speed)
    return xp.concatenate([move, fingers[:, None]], axis=-1).astype(xp.float32)


def shapes(state: LiftState) -> tuple[Shape, ...]:
    """Returns what is seen: floor, peg and gripper."""
    peg = box(state.peg, PEG_HALF_LENGTH, PEG_RADIUS, OBJECT, state.angle)
    return (floor_shape(), peg, *gripper_shapes(state.gripper))


TOY = Toy(
    env_id=ENV_ID,
    instruction=INSTRUCTION,
    horizon=HORIZON,
    action_dim=ACTION_DIM,
    state_dim=STATE_DIM,
    max_step=MAX_STEP,
    reset=reset_state,
    step=step_state,
    observe=observe_state,
    expert=expert_action,
    spec=task_spec(),
    norm_stats=norm_stats(),
    opening=lambda state: finger_opening(state.gripper),
    shapes=shapes,
    view=VIEW,
)
