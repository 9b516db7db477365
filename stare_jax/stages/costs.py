"""Stage costs l_k (equation 3 and appendix D), which measure how badly each stage was carried out; never below 0.

A cost is (params, signals `[T]`, mask `[T]` of the existing steps with label k) -> scalar. T_k is the number of these
steps, the stage's entry is the first of them, and a stage without steps costs 0. `stage_costs` checks the arrays.
"""

import chex
import jax
import jax.numpy as jnp

from stare_jax.stages import geometry, measures
from stare_jax.stages.separate import Separation, stage_mask
from stare_jax.stages.spec import StageParams, TaskSpec
from stare_jax.types import Array, Signals


def stage_costs(spec: TaskSpec, signals: Signals, separation: Separation, valid: Array | None = None) -> Array:
    """Returns l_k of every stage (3, appendix D), float32 `[K]`, all >= 0.

    Args:
      spec: the task.
      signals: leaves `[T, ...]`.
      separation: of the same trajectory.
      valid: bool `[T]` which states exist, a prefix; None for all.
    """
    num_states = measures.num_states(signals)
    signals = measures.as_signals(signals, (num_states,))
    chex.assert_shape(separation.stage_t, (num_states,), custom_message="separation.stage_t")
    mask = stage_mask(separation, spec.num_stages, valid)
    signals = _without_padding(signals, measures.as_valid(valid, num_states))
    costs = [cost_fn(spec.params, signals, mask_k) for cost_fn, mask_k in zip(spec.cost_fns, mask, strict=True)]
    return jnp.stack(costs)


def reach_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of reach: mean ||x_ee - x_obj|| (3).

    Differs from the paper: measures to the object as equation 3 does, not to the goal as appendix D does.
    """
    del params
    return _mean(measures.reach_distance(signals), mask)


def grasp_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of grasp: mean alpha_1 d_contact + alpha_2 slip, d_contact the distance to the object."""
    slip = measures.slip(signals, slip_tol=params.slip_tol)
    return _mean(params.alpha_align * measures.reach_distance(signals) + params.alpha_slip * slip, mask)


def transport_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of transport: mean ||x_obj - x_ref||, x_ref(t) a point of the path p0 -> p1 -> goal.

    p0 is the object at the stage's entry, p1 has the goal's x and y and the higher z of the two. x_ref(t) is the point
    of the path that is nearest to the object (`path="nearest"`), or the one at the fraction i / T_k of the path's
    length in the stage's i-th step, i = 0 .. T_k - 1 (`path="time"`).

    Differs from the paper: this fixes the path, which the paper leaves open.
    """
    goal = signals.goal_pos
    start = jnp.broadcast_to(_at_entry(signals.obj_pos, mask), goal.shape)
    corner = goal.at[:, 2].set(jnp.maximum(start[:, 2], goal[:, 2]))
    if params.path == "nearest":
        first = geometry.segment_distance(signals.obj_pos, start, corner)
        second = geometry.segment_distance(signals.obj_pos, corner, goal)
        return _mean(jnp.minimum(first, second), mask)
    fraction = (jnp.cumsum(mask) - 1) / jnp.maximum(jnp.sum(mask), 1)
    reference = geometry.polyline_point(jnp.clip(fraction, 0.0, 1.0), start, corner, goal)
    return _mean(geometry.safe_norm(signals.obj_pos - reference), mask)


def place_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of place: lambda_stab mean ||x_obj(t) - x_obj(t-1)|| over the stage's last min(M, T_k) steps."""
    last_steps = mask & (_steps_left(mask) < params.stable_steps)
    return params.lambda_stab * _mean(geometry.safe_norm(measures.displacement(signals)), last_steps)


def contact_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of contact: mean alpha_c (1 - contact) + alpha_perp d_perp.

    d_perp(t) is the horizontal distance of the end-effector from the line through the object along v, the horizontal
    direction from object to goal at the stage's entry.
    """
    offset = geometry.horizontal(signals.tcp_pos - signals.obj_pos)
    d_perp = geometry.safe_norm(geometry.reject(offset, _goal_direction(signals, mask)))
    return _mean(params.alpha_contact * (1.0 - signals.is_contact) + params.alpha_perp * d_perp, mask)


def push_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of push and pull: ||x_obj(last) - x_goal|| + lambda_perp mean ||dx_perp||.

    dx_perp(t) is the part of x_obj(t) - x_obj(t-1) orthogonal to the direction v of `contact_cost`, here at this
    stage's entry.
    """
    is_last = mask & (_steps_left(mask) == 0)
    distance = jnp.sum(jnp.where(is_last, measures.goal_distance(signals), 0.0))
    sideways = geometry.reject(measures.displacement(signals), _goal_direction(signals, mask))
    return distance + params.lambda_perp * _mean(geometry.safe_norm(sideways), mask)


def goal_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of goal: mean beta_x ||x_obj - x_goal|| + beta_v ||x_obj(t) - x_obj(t-1)||."""
    motion = geometry.safe_norm(measures.displacement(signals))
    return _mean(params.beta_x * measures.goal_distance(signals) + params.beta_v * motion, mask)


def lift_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of lift: mean max(0, h_min - h).

    Differs from the paper: heights are above where the object rested.
    """
    return _mean(jnp.maximum(0.0, params.h_min - measures.height(signals)), mask)


def upright_cost(params: StageParams, signals: Signals, mask: Array) -> Array:
    """Returns the cost of upright: mean angle between the object's `up_axis` and the vertical line."""
    return _mean(geometry.tilt(signals.obj_quat, params.up_axis), mask)


def _without_padding(signals: Signals, valid: Array) -> Signals:
    """Replaces states that do not exist by the first one, so that their contents reach no gradient."""

    def replace(leaf):
        return jnp.where(valid.reshape(valid.shape + (1,) * (leaf.ndim - 1)), leaf, leaf[:1])

    return jax.tree.map(replace, signals)


def _mean(value_t: Array, mask: Array) -> Array:
    """Returns the mean over the masked steps, 0 where there are none."""
    return jnp.sum(jnp.where(mask, value_t, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _at_entry(value_t: Array, mask: Array) -> Array:
    """Returns `[T, D]` at the first masked step, or at t = 0 where there is none, `[D]`."""
    return value_t[jnp.argmax(mask)]


def _steps_left(mask: Array) -> Array:
    """Returns the number of masked steps after t, `[T]`."""
    return jnp.sum(mask) - jnp.cumsum(mask)


def _goal_direction(signals: Signals, mask: Array) -> Array:
    """Returns the unit horizontal direction `[3]` from object to goal at the stage's entry; 0 where they coincide."""
    return geometry.direction(geometry.horizontal(_at_entry(signals.goal_pos - signals.obj_pos, mask)))
