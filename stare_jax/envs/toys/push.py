"""A point gripper pushes a block to a goal on a plane, seen from above: the toy of the push family.

Gripper and block are discs. An action moves the gripper by up to `MAX_STEP` metres; where it would overlap the block,
the block yields along the line of centres, so that it has to be pushed from behind and steered. Stages, costs and
potentials are those of `PushCube-v1` with thresholds of this size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.toys.drawing import GOAL, GRIPPER, OBJECT, Shape, View, disc
from stare_jax.envs.toys.vec_env import Toy, ToyEnv, array_module, bounded, unit_vector
from stare_jax.stages.spec import TaskSpec
from stare_jax.stages.tasks import get_task
from stare_jax.types import Array, NormStats, Signals

ENV_ID = "ToyPush-v0"
INSTRUCTION = "push the block to the goal"
HORIZON = 30
ACTION_DIM = 2
STATE_DIM = 6

MAX_STEP = 0.015
GRIPPER_RADIUS = 0.01
BLOCK_RADIUS = 0.02
SUCCESS_DISTANCE = 0.025
WORKSPACE = 0.2
HEIGHT = 0.02
START_DISTANCE = (0.07, 0.10)
GOAL_DISTANCE = (0.05, 0.07)
NUM_SUBSTEPS = 4
VIEW = View(left=-0.165, bottom=-0.15, side=0.3)
"""The part of the plane that pictures show: where episodes take place, but for those that go wrong."""


class ToyState(NamedTuple):
    """Positions in metres, `[2]` each; `is_contact` says whether the last action touched the block."""

    gripper: Array
    block: Array
    goal: Array
    is_contact: Array


def task_spec() -> TaskSpec:
    """Returns the stages of the push family with thresholds for this plane."""
    push = get_task("PushCube-v1")
    params = dataclasses.replace(push.params, delta_reach=0.04, delta_goal=0.035, d_reach=0.05, d_push=0.05)
    return dataclasses.replace(push, env_id=ENV_ID, instruction=INSTRUCTION, params=params)


def norm_stats() -> NormStats:
    """Returns the ranges of actions and states."""
    return NormStats(
        action_q01=np.full(ACTION_DIM, -1.0, np.float32),
        action_q99=np.full(ACTION_DIM, 1.0, np.float32),
        action_mask=np.ones(ACTION_DIM, bool),
        state_q01=np.full(STATE_DIM, -WORKSPACE, np.float32),
        state_q99=np.full(STATE_DIM, WORKSPACE, np.float32),
    )


def reset_state(seed: Array) -> ToyState:
    """Draws an episode's start: block near the centre, goal to its right, gripper to its left."""
    draw = jax.random.uniform(jax.random.key(seed), (6,), jnp.float32)
    block = 0.06 * (draw[:2] - 0.5)
    goal = block + _offset(draw[2:4], distance=GOAL_DISTANCE, max_angle=0.6)
    gripper = block - _offset(draw[4:6], distance=START_DISTANCE, max_angle=0.9)
    return ToyState(gripper, block, goal, jnp.array(False))


def _offset(draw: Array, *, distance: tuple[float, float], max_angle: float) -> Array:
    """Turns two numbers in [0, 1) into a vector `[2]` that points to the right, at most `max_angle` radians off."""
    length = distance[0] + (distance[1] - distance[0]) * draw[0]
    angle = max_angle * (2.0 * draw[1] - 1.0)
    return length * jnp.array([jnp.cos(angle), jnp.sin(angle)])


def step_state(state: ToyState, action: Array, *, max_step: Array | float = MAX_STEP) -> ToyState:
    """Moves the gripper by `max_step * clip(action, -1, 1)` and the block out of its way."""
    velocity = max_step * jnp.clip(action, -1.0, 1.0) / NUM_SUBSTEPS
    gripper, block, is_contact = state.gripper, state.block, jnp.array(False)
    for _ in range(NUM_SUBSTEPS):
        gripper = jnp.clip(gripper + velocity, -WORKSPACE, WORKSPACE)
        offset = block - gripper
        distance = jnp.linalg.norm(offset)
        touches = distance < GRIPPER_RADIUS + BLOCK_RADIUS
        normal = offset / jnp.maximum(distance, 1e-6)
        block = jnp.where(touches, gripper + (GRIPPER_RADIUS + BLOCK_RADIUS) * normal, block)
        is_contact |= touches
    return ToyState(gripper, block, state.goal, is_contact)


def observe_state(state: ToyState) -> tuple[Array, Signals]:
    """Returns the observed state `[S]` (gripper, block, goal) and the signals."""
    upright = jnp.array([1.0, 0.0, 0.0, 0.0])
    block = jnp.append(state.block, HEIGHT)
    signals = Signals(
        tcp_pos=jnp.append(state.gripper, HEIGHT),
        tcp_quat=upright,
        obj_pos=block,
        obj_quat=upright,
        grasp_pos=block,
        goal_pos=jnp.append(state.goal, HEIGHT),
        goal_quat=upright,
        is_grasped=jnp.array(False),
        is_contact=state.is_contact,
        success=jnp.linalg.norm(state.block - state.goal) < SUCCESS_DISTANCE,
        support_z=jnp.float32(HEIGHT),
    )
    return jnp.concatenate([state.gripper, state.block, state.goal]), signals


def expert_action(signals: Signals, *, speed: Array | float = 1.0, max_step: Array | float = MAX_STEP) -> Array:
    """Acts in closed loop: goes behind the block, as seen from the goal, then pushes along the line.

    Args:
        signals: leaves `[B, ...]`, of NumPy or JAX.
        speed: fraction of the largest step that it uses.
        max_step: metres, the largest step.

    Returns:
        float32 `[B, 2]` in [-1, 1].
    """
    gripper, block, goal = (x[:, :2] for x in (signals.tcp_pos, signals.obj_pos, signals.goal_pos))
    xp = array_module(gripper)
    forward = unit_vector(goal - block)
    offset = gripper - block
    along = xp.sum(offset * forward, axis=-1, keepdims=True)
    sideways = offset - along * forward
    is_behind = (along < 0) & (xp.linalg.norm(sideways, axis=-1, keepdims=True) < 0.3 * -along)
    target = xp.where(is_behind, block, block - 2 * BLOCK_RADIUS * forward)
    return bounded((target - gripper) / max_step, speed).astype(xp.float32)


def shapes(state: ToyState) -> tuple[Shape, ...]:
    """Returns what is seen: the goal, as far from which a block may be for success, the block and the gripper."""
    return (
        disc(state.goal, SUCCESS_DISTANCE, GOAL),
        disc(state.block, BLOCK_RADIUS, OBJECT),
        disc(state.gripper, GRIPPER_RADIUS, GRIPPER),
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
    opening=lambda state: jnp.float32(0.0),
    shapes=shapes,
    view=VIEW,
)


class ToyPush(ToyEnv):
    """`VecEnv` of this plane; see `envs.base`."""

    def __init__(self, num_envs: int):
        super().__init__(TOY, num_envs)
