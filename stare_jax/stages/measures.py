"""Quantities derived from `Signals`, never stored: distances, height, slip, duration of a grasp.

The functions of one state take leaves with any leading axes; those of a history take `[T, ...]`, one whole episode.
All of them rely on `as_signals` having checked the leaves.
"""

import chex
import jax
import jax.numpy as jnp

from stare_jax.stages import geometry
from stare_jax.types import SIGNAL_FLAGS, SIGNAL_SHAPES, Array, Signals


def as_signals(signals: Signals, leading: tuple[int, ...]) -> Signals:
    """Returns the signals as JAX arrays, float32 and bool, after checking every field's shape and type.

    Args:
      signals: leaves `[*leading, ...]`.
      leading: `()` for one state, `(T,)` for a trajectory.

    Raises:
      AssertionError: a field has another shape or type; the message names it.
    """
    arrays = []
    for name, value, shape in zip(Signals._fields, signals, SIGNAL_SHAPES, strict=True):
        is_flag = name in SIGNAL_FLAGS
        chex.assert_shape(value, leading + shape, custom_message=f"signals.{name}")
        chex.assert_type(value, bool if is_flag else float, custom_message=f"signals.{name}")
        arrays.append(jnp.asarray(value, bool if is_flag else jnp.float32))
    return Signals(*arrays)


def num_states(signals: Signals) -> int:
    """Returns T of signals with leaves `[T, ...]`."""
    chex.assert_rank(signals.success, 1, custom_message="signals.success")
    return signals.success.shape[0]


def as_valid(valid: Array | None, num_steps: int) -> Array:
    """Returns the bool `[T]` mask of existing steps; None means that all `num_steps` exist."""
    if valid is None:
        return jnp.ones(num_steps, bool)
    chex.assert_shape(valid, (num_steps,), custom_message="valid")
    chex.assert_type(valid, bool, custom_message="valid")
    return jnp.asarray(valid)


def reach_distance(signals: Signals) -> Array:
    """Returns ||x_ee - x_obj||, measured to the point of the object to be reached, `[...]`."""
    return geometry.safe_norm(signals.tcp_pos - signals.grasp_pos)


def goal_distance(signals: Signals) -> Array:
    """Returns ||x_obj - x_goal||, `[...]`."""
    return geometry.safe_norm(signals.obj_pos - signals.goal_pos)


def horizontal_goal_distance(signals: Signals) -> Array:
    """Returns the horizontal distance of the object to the goal, `[...]`."""
    return geometry.safe_norm(geometry.horizontal(signals.obj_pos - signals.goal_pos))


def height(signals: Signals) -> Array:
    """Returns h, the object's height above where it rested at the start, `[...]`."""
    return signals.obj_pos[..., 2] - signals.support_z


def displacement(signals: Signals) -> Array:
    """Returns x_obj(t) - x_obj(t-1), `[T, 3]`, 0 at t = 0."""
    return _difference(signals.obj_pos)


def consecutive_grasp(signals: Signals) -> Array:
    """Returns the number of steps in a row, ending at t, in which the object has been held, float32 `[T]`."""
    return steps_in_a_row(signals.is_grasped)


def steps_in_a_row(flag_t: Array) -> Array:
    """Returns the number of steps in a row, ending at t, in which a flag `[T]` has been set, float32 `[T]`."""
    steps = jnp.arange(flag_t.shape[0])
    last_unset = jax.lax.cummax(jnp.where(flag_t, -1, steps))
    return (steps - last_unset).astype(jnp.float32)


def slip(signals: Signals, *, slip_tol: float) -> Array:
    """Returns whether the grasp slipped in the step that led to t, bool `[T]`, False at t = 0.

    A grasp has slipped where the object was held and no longer is, or where it is held throughout the step and moved by
    more than `slip_tol` metres in the end-effector's frame.
    """
    was_grasped = jnp.concatenate([jnp.zeros(1, bool), signals.is_grasped[:-1]])
    in_hand = geometry.rotate_inverse(signals.tcp_quat, signals.obj_pos - signals.tcp_pos)
    moved = geometry.safe_norm(_difference(in_hand)) > slip_tol
    return was_grasped & (~signals.is_grasped | moved)


def _difference(position_t: Array) -> Array:
    return jnp.diff(position_t, axis=0, prepend=position_t[:1])
