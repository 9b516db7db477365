"""A gripper picks up a block and places it on a stand, in a vertical plane: the toy of the pick-place family.

An action moves the gripper by up to `MAX_STEP` metres along x and z and opens or closes it. A held block moves with it
and does not pass through floor or stand; one that is let go drops onto what is below. Stages, costs and potentials are
those of `StackCube-v1` with thresholds of this size. Positions are (x, z), metres, z upwards.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.toys.drawing import GOAL, OBJECT, Shape, box, disc
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

ENV_ID = "ToyPlace-v0"
INSTRUCTION = "place the block on the stand"
HORIZON = 40
ACTION_DIM = 3
STATE_DIM = 7

MAX_STEP = 0.015
BLOCK_RADIUS = 0.015
STAND_HEIGHT = 0.02
STAND_RADIUS = 0.03
"""Half of its width: a block whose centre is within rests on it."""
SUCCESS_DISTANCE = 0.02
START_HEIGHT = (0.05, 0.09)
START_DISTANCE = 0.05
GOAL_DISTANCE = (0.08, 0.12)


class PlaceState(NamedTuple):
    """State of an episode."""

    gripper: Gripper
    block: Array
    """`[2]` its centre."""
    goal_x: Array
    """x of the middle of the stand."""


def task_spec() -> TaskSpec:
    """Returns the stages of the pick-place family with thresholds for this plane."""
    stack = get_task("StackCube-v1")
    params = dataclasses.replace(
        stack.params, delta_reach=0.03, delta_lift=0.015, delta_goal=0.03, d_reach=0.05, d_trans=0.05, d_place=0.03
    )
    return dataclasses.replace(stack, env_id=ENV_ID, instruction=INSTRUCTION, params=params)


def norm_stats() -> NormStats:
    """Returns the ranges of actions and states."""
    return NormStats(
        action_q01=np.full(ACTION_DIM, -1.0, np.float32),
        action_q99=np.full(ACTION_DIM, 1.0, np.float32),
        action_mask=np.ones(ACTION_DIM, bool),
        state_q01=np.array([-WORKSPACE, 0.0, 0.0, 0.0, -WORKSPACE, 0.0, -WORKSPACE], np.float32),
        state_q99=np.array([WORKSPACE, WORKSPACE, 1.0, 1.0, WORKSPACE, WORKSPACE, WORKSPACE], np.float32),
    )


def reset_state(seed: Array) -> PlaceState:
    """Draws an episode's start: block on the floor, stand to its right, open gripper above the block."""
    draw = jax.random.uniform(jax.random.key(seed), (4,), jnp.float32)
    block_x = 0.06 * (draw[0] - 0.5) - 0.05
    goal_x = block_x + GOAL_DISTANCE[0] + (GOAL_DISTANCE[1] - GOAL_DISTANCE[0]) * draw[1]
    height = START_HEIGHT[0] + (START_HEIGHT[1] - START_HEIGHT[0]) * draw[2]
    position = jnp.array([block_x + START_DISTANCE * (2 * draw[3] - 1), height])
    gripper = Gripper(position, jnp.float32(1.0), jnp.array(False))
    return PlaceState(gripper, jnp.array([block_x, BLOCK_RADIUS]), goal_x)


def resting_height(x: Array, goal_x: Array) -> Array:
    """Returns the height of the centre of a block that rests at x."""
    return BLOCK_RADIUS + jnp.where(jnp.abs(x - goal_x) < STAND_RADIUS, STAND_HEIGHT, 0.0)


def step_state(state: PlaceState, action: Array, *, max_step: Array | float = MAX_STEP) -> PlaceState:
    """Moves the gripper by `max_step` times the first two numbers of the action, and its fingers by the third."""
    action = jnp.clip(action, -1.0, 1.0)
    displacement, opening = max_step * action[:2], move_fingers(state.gripper.opening, action[2])
    free = approach(state.gripper, displacement, opening, is_inside=lambda x: _distance(x, state.block) < BLOCK_RADIUS)
    carrying, carried = _carry(state, displacement, opening)
    was_holding = state.gripper.is_holding
    gripper = jax.tree.map(lambda a, b: jnp.where(was_holding, a, b), carrying, free)
    block = jnp.where(was_holding, carried, state.block)
    dropped = block.at[1].set(resting_height(block[0], state.goal_x))
    return PlaceState(gripper, jnp.where(gripper.is_holding, block, dropped), state.goal_x)


def _carry(state: PlaceState, displacement: Array, opening: Array) -> tuple[Gripper, Array]:
    """Moves the gripper and the block in it, along z first, as far as the block can go."""
    wanted = move_gripper(state.gripper.position, displacement) - state.gripper.position
    lowest = resting_height(state.block[0], state.goal_x)
    z = jnp.maximum(state.block[1] + wanted[1], lowest)
    x = state.block[0] + wanted[0]
    x = jnp.where(z < resting_height(x, state.goal_x), state.block[0], x)
    block = jnp.stack([x, z])
    position = state.gripper.position + block - state.block
    return Gripper(position, opening, opening < HOLDING_OPENING), block


def _distance(a: Array, b: Array) -> Array:
    return jnp.linalg.norm(a - b)


def observe_state(state: PlaceState) -> tuple[Array, Signals]:
    """Returns the observed state `[S]` (gripper, opening, whether it holds, block, x of the goal) and the signals."""
    gripper, block = state.gripper, state.block
    goal = jnp.stack([state.goal_x, BLOCK_RADIUS + STAND_HEIGHT])
    upright = jnp.array([1.0, 0.0, 0.0, 0.0])
    is_near = jnp.abs(block[0] - state.goal_x) < SUCCESS_DISTANCE
    signals = Signals(
        tcp_pos=_in_space(gripper.position),
        tcp_quat=upright,
        obj_pos=_in_space(block),
        obj_quat=upright,
        grasp_pos=_in_space(block),
        goal_pos=_in_space(goal),
        goal_quat=upright,
        is_grasped=gripper.is_holding,
        is_contact=gripper.is_holding,
        success=is_near & ~gripper.is_holding,
        support_z=jnp.float32(BLOCK_RADIUS),
    )
    fingers = jnp.stack([gripper.opening, gripper.is_holding.astype(jnp.float32)])
    return jnp.concatenate([gripper.position, fingers, block, goal[:1]]), signals


def _in_space(position: Array) -> Array:
    """Returns (x, 0, z)."""
    return jnp.stack([position[0], jnp.zeros_like(position[0]), position[1]])


CLEARANCE = 0.01
"""Metres above the stand at which the expert carries the block."""
CENTRED = 0.006
"""Metres from the middle, of the block or the stand, that the expert is content with."""


def expert_action(signals: Signals, *, speed: Array | float = 1.0, max_step: Array | float = MAX_STEP) -> Array:
    """Acts in closed loop: goes to the block, closes, lifts, carries it above the stand, lowers it, lets go.

    Args:
        signals: leaves `[B, ...]`, of NumPy or JAX.
        speed: fraction of the largest step that it uses.
        max_step: metres, the largest step.

    Returns:
        float32 `[B, 3]` in [-1, 1].
    """
    gripper, block, goal = (x[:, ::2] for x in (signals.tcp_pos, signals.obj_pos, signals.goal_pos))
    xp = array_module(gripper)
    zeros, ones = xp.zeros_like(gripper[:, 0]), xp.ones_like(gripper[:, 0])

    # ---- Without the block ------------------------------------------------------------------------------------------
    to_block = block - gripper
    is_around = xp.linalg.norm(to_block, axis=-1) < CENTRED
    is_done = signals.success
    away = xp.where(is_done[:, None], xp.stack([zeros, ones], axis=-1) * max_step, to_block)
    free_fingers = xp.where(is_around & ~is_done, -ones, ones)

    # ---- With the block ---------------------------------------------------------------------------------------------
    to_goal = goal - block
    is_above = xp.abs(to_goal[:, 0]) < CENTRED
    missing = to_goal[:, 1] + CLEARANCE
    # Across only when it is high enough to pass over the edge of the stand.
    across = xp.where(missing < CLEARANCE, to_goal[:, 0], zeros)
    carried = xp.where(
        is_above[:, None], xp.stack([to_goal[:, 0], to_goal[:, 1]], axis=-1), xp.stack([across, missing], axis=-1)
    )
    held_fingers = xp.where(is_above & (-to_goal[:, 1] < CENTRED), ones, -ones)

    is_held = signals.is_grasped
    move = bounded(xp.where(is_held[:, None], carried, away) / max_step, speed)
    fingers = xp.where(is_held, held_fingers, free_fingers)
    return xp.concatenate([move, fingers[:, None]], axis=-1).astype(xp.float32)


def shapes(state: PlaceState) -> tuple[Shape, ...]:
    """Returns what is seen: floor, stand, block and gripper."""
    half = 0.5 * STAND_HEIGHT
    return (
        floor_shape(),
        box(jnp.stack([state.goal_x, jnp.float32(half)]), STAND_RADIUS, half, GOAL),
        disc(state.block, BLOCK_RADIUS, OBJECT),
        *gripper_shapes(state.gripper),
    )


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
