"""Stage potentials Phi_k (equation 4 and appendix E), in [0, 1], which measure how far the active stage has come.

A potential is (params, signals `[T]`) -> `[T]`; sigma is the logistic function. `potentials` checks the arrays.

Three potentials are constant in the states in which they are used: contact and the grasp of lift-upright are 0, since
the label moves on with the event that they indicate; goal is 1 unless the object slides back out of the region. These
are the paper's formulas. In such a stage nothing but the progressive form grades the states, and only at its borders.
Reach ends `delta_reach` before the object; with `delta_reach=0` contact alone ends it, and its potential grades the
whole approach.
"""

import chex
import jax
import jax.numpy as jnp

from stare_jax.stages import geometry, measures
from stare_jax.stages.separate import Separation
from stare_jax.stages.spec import StageParams, TaskSpec
from stare_jax.types import Array, Signals


def potentials(spec: TaskSpec, signals: Signals, separation: Separation) -> Array:
    """Returns Phi(s_t), the potential of the stage that is active at t (4, appendix E), float32 `[T]` in [0, 1].

    With `params.progressive`, the default, it is (k + Phi_k) / K, which no completed stage lowers. Where the stage is
    switched off in `params.enabled`, it keeps its value of the step before (0 at t = 0), so that the switch adds no
    jump of its own.

    Args:
      spec: the task.
      signals: leaves `[T, ...]`.
      separation: of the same trajectory.

    Differs from the paper: the progressive form; the paper's own is `progressive=False`.
    """
    num_states = measures.num_states(signals)
    signals = measures.as_signals(signals, (num_states,))
    stage_t = jnp.asarray(separation.stage_t)
    chex.assert_shape(stage_t, (num_states,), custom_message="separation.stage_t")
    chex.assert_type(stage_t, int, custom_message="separation.stage_t")
    by_stage = jnp.stack([potential_fn(spec.params, signals) for potential_fn in spec.potential_fns])
    potential_t = jnp.take_along_axis(by_stage, stage_t[None], axis=0)[0]
    if spec.params.progressive:
        potential_t = (stage_t + potential_t) / spec.num_stages
    if spec.params.enabled is not None:
        potential_t = _hold(potential_t, jnp.array(spec.params.enabled, bool)[stage_t])
    return potential_t


def reach_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of reach: sigma(1 - ||x_ee - x_obj|| / d_reach) (4)."""
    return _closeness(measures.reach_distance(signals), params.d_reach)


def lasting_grasp_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of grasp in pick-place: beta_1 grasped + beta_2 tanh(consec_grasp / tau)."""
    lasting = jnp.tanh(measures.consecutive_grasp(signals) / params.tau)
    return params.beta1 * signals.is_grasped + params.beta2 * lasting


def transport_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of transport: sigma(1 - ||x_obj - x_goal|| / d_trans) + beta_3 grasped."""
    return _closeness(measures.goal_distance(signals), params.d_trans) + params.beta3 * signals.is_grasped


def place_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of place: sigma(1 - ||x_obj - x_goal|| / d_place) + beta_4 g(R_obj, R_goal)."""
    alignment = geometry.rotation_alignment(signals.obj_quat, signals.goal_quat)
    return _closeness(measures.goal_distance(signals), params.d_place) + params.beta4 * alignment


def contact_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of contact: beta_1 contact."""
    return params.beta1 * signals.is_contact.astype(jnp.float32)


def push_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of push and pull: sigma(1 - ||x_obj - x_goal|| / d_push)."""
    return _closeness(measures.goal_distance(signals), params.d_push)


def goal_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of goal: 1 where the object is horizontally within `delta_goal` of the goal, else 0."""
    return (measures.horizontal_goal_distance(signals) < params.delta_goal).astype(jnp.float32)


def grasp_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of grasp in lift-upright: beta_1 grasped."""
    return params.beta1 * signals.is_grasped.astype(jnp.float32)


def lift_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of lift: sigma(h / h_lift), h the height above where the object rested."""
    return jax.nn.sigmoid(measures.height(signals) / params.h_lift)


def upright_potential(params: StageParams, signals: Signals) -> Array:
    """Returns the potential of upright: |cos| of the angle between the object's `up_axis` and the vertical."""
    return geometry.uprightness(signals.obj_quat, params.up_axis)


def _closeness(distance: Array, scale: float) -> Array:
    return jax.nn.sigmoid(1.0 - distance / scale)


def _hold(value_t: Array, enabled_t: Array) -> Array:
    """Returns the value at the last step up to t at which it was enabled, `[T]`; 0 before the first one."""
    steps = jnp.arange(value_t.shape[0])
    last_enabled = jax.lax.cummax(jnp.where(enabled_t, steps, -1))
    return jnp.where(last_enabled >= 0, value_t[jnp.maximum(last_enabled, 0)], 0.0)
