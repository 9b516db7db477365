"""Rewards of one episode of N actions before shaping: sparse, RL4VLA's, and the naive dense one.

Every function returns float32 `[N]`: r_t, t = 0 .. N-1, is the reward of the action that led from state t to state
t + 1, and 0 where that state does not exist.
"""

import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from stare_jax.stages import geometry, measures
from stare_jax.stages.separate import Separation
from stare_jax.stages.spec import StageParams, TaskSpec
from stare_jax.types import Array, Signals

Reward = Literal["success", "rl4vla", "dense"]
"""Names of the three rewards, for configurations."""


def episode_rewards(
    reward: Reward, spec: TaskSpec, signals: Signals, separation: Separation, valid: Array | None = None
) -> Array:
    """Returns the reward of that name, float32 `[N]`.

    Args:
      reward: one of `Reward`.
      spec: the task.
      signals: leaves `[T, ...]` of the T = N + 1 states.
      separation: of the same trajectory.
      valid: bool `[T]` which states exist, a prefix; None for all.

    Raises:
      ValueError: see `check_reward`.
    """
    check_reward(reward, spec)
    if reward == "success":
        return success_rewards(signals.success, valid)
    if reward == "rl4vla":
        return rl4vla_rewards(signals.is_grasped, signals.success, valid)
    return dense_rewards(spec, signals, separation, valid)


def check_reward(reward: Reward, spec: TaskSpec) -> None:
    """Checks that a task can earn a reward.

    Raises:
      ValueError: there is no such reward, or it pays for a grasp, which the task has none of.
    """
    if reward not in (allowed := typing.get_args(Reward)):
        raise ValueError(f"reward: got {reward!r}, expected one of {allowed}")
    if reward == "rl4vla" and "grasp" not in spec.stage_names:
        stages = ", ".join(spec.stage_names)
        raise ValueError(f"reward: got 'rl4vla', expected another one for {spec.env_id}, whose stages are {stages}")


def success_rewards(success: Array, valid: Array | None = None) -> Array:
    """Returns r_t = 1 at the first step whose next state is a success, else 0, float32 `[N]`.

    Args:
      success: bool `[T]` of the T = N + 1 states.
      valid: bool `[T]` which states exist; None for all.
    """
    _, success, is_action = _checked(success, success, valid)
    is_first = jnp.cumsum(success & is_action) == 1
    return (success & is_action & is_first).astype(jnp.float32)


def rl4vla_rewards(is_grasped: Array, success: Array, valid: Array | None = None, *, num_held: int = 5) -> Array:
    """Returns the reward of RL4VLA (arXiv:2505.19789) and of RLinf, float32 `[N]`.

        r_t = R_{t+1} - R_t,    R_0 = 0
        R_t = 0.1 [grasped by t] + 0.1 [grasped num_held states in a row by t] + 1.0 [success at t, and grasped by t]

    A grasp is paid once, even if the object is dropped; the pay for success is taken back when the object leaves its
    goal. The first state, to which no action led, counts as not grasped.

    Args:
      is_grasped: bool `[T]` of the T = N + 1 states.
      success: bool `[T]`.
      valid: bool `[T]` which states exist, a prefix; None for all.
      num_held: states in a row for which the object has to be held; 5 is RL4VLA's own number.
    """
    is_grasped, success, is_action = _checked(is_grasped, success, valid)
    has_grasped = jax.lax.cummax(is_grasped.astype(jnp.int32)) > 0
    has_held = jax.lax.cummax((measures.steps_in_a_row(is_grasped) >= num_held).astype(jnp.int32)) > 0
    total = 0.1 * has_grasped + 0.1 * has_held + 1.0 * (success & has_grasped)
    return jnp.where(is_action, jnp.diff(total, prepend=0.0), 0.0).astype(jnp.float32)


def dense_rewards(spec: TaskSpec, signals: Signals, separation: Separation, valid: Array | None = None) -> Array:
    """Returns minus the distance that remains in the stage of the next state, r_t = -d_{g(t+1)}(s_{t+1}), `[N]`.

    The naive dense baseline: it is not a difference, so every step that a task takes longer costs what remains.
    Distances are metres, or radians where the stage is about an orientation.

    Args:
      spec: the task; `distance_fns` are the distances of its stages.
      signals: leaves `[T, ...]` of the T = N + 1 states.
      separation: of the same trajectory.
      valid: bool `[T]` which states exist; None for all.
    """
    num_states = measures.num_states(signals)
    signals = measures.as_signals(signals, (num_states,))
    chex.assert_shape(separation.stage_t, (num_states,), custom_message="separation.stage_t")
    chex.assert_type(separation.stage_t, int, custom_message="separation.stage_t")
    by_stage = jnp.stack([distance_fn(spec.params, signals) for distance_fn in spec.distance_fns])
    distance_t = jnp.take_along_axis(by_stage, jnp.asarray(separation.stage_t)[None], axis=0)[0]
    return jnp.where(measures.as_valid(valid, num_states)[1:], -distance_t[1:], 0.0)


def distance_to_object(params: StageParams, signals: Signals) -> Array:
    """Returns the distance of the end-effector from the object, metres; of reach, grasp and contact."""
    del params
    return measures.reach_distance(signals)


def distance_to_goal(params: StageParams, signals: Signals) -> Array:
    """Returns the distance of the object from its goal, metres; of transport, place, push, pull and goal."""
    del params
    return measures.goal_distance(signals)


def distance_to_height(params: StageParams, signals: Signals) -> Array:
    """Returns the height that is missing to `h_min`, metres; of lift."""
    return jnp.maximum(0.0, params.h_min - measures.height(signals))


def distance_to_upright(params: StageParams, signals: Signals) -> Array:
    """Returns the angle between the object's `up_axis` and the vertical line, radians; of upright."""
    return geometry.tilt(signals.obj_quat, params.up_axis)


def _checked(is_grasped: Array, success: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Returns both flags of the states that actions led to, bool `[N]`, and which of these states exist."""
    chex.assert_rank((is_grasped, success), 1)
    chex.assert_type((is_grasped, success), bool)
    chex.assert_equal_shape((is_grasped, success))
    valid = measures.as_valid(valid, success.shape[0])
    return jnp.asarray(is_grasped)[1:], jnp.asarray(success)[1:], valid[1:]
