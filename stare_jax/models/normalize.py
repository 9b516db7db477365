"""Quantile normalisation of actions and states, in the convention of OpenVLA's data set statistics.

Works on NumPy arrays (and returns NumPy) as well as on JAX arrays and tracers; every function takes any leading axes.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.types import Array, NormStats

MIN_STATE_RANGE = 0.02
"""least range of a state dimension, in metres or in entries of a rotation matrix, see `scale_state`."""
QUANTILE_EPS = 1e-6
"""number that openpi adds to a range, in either direction."""


def _to_unit(x: Array, low: Array, high: Array) -> Array:
    """Maps `[low, high]` to `[-1, 1]` and clips; dimensions with `low == high` become 0."""
    xp = jnp if isinstance(x, jax.Array) else np
    span = xp.asarray(high, xp.float32) - xp.asarray(low, xp.float32)
    is_constant = span == 0
    unit = 2.0 * (x - low) / xp.where(is_constant, 1.0, span) - 1.0
    return xp.where(is_constant, 0.0, xp.clip(unit, -1.0, 1.0)).astype(xp.float32)


def normalize_action(action: Array, stats: NormStats) -> Array:
    """Maps raw actions to [-1, 1], `n = clip(2 (a - q01) / (q99 - q01) - 1, -1, 1)`.

    Args:
        action: float32 `[..., A]`, simulator units.
        stats: quantiles; dimensions whose `action_mask` is False pass through unchanged (and unclipped).

    Returns:
        float32 `[..., A]`; 0 in masked-in dimensions with q01 == q99.
    """
    xp = jnp if isinstance(action, jax.Array) else np
    unit = _to_unit(action, stats.action_q01, stats.action_q99)
    return xp.where(stats.action_mask, unit, action).astype(xp.float32)


def unnormalize_action(unit_action: Array, stats: NormStats) -> Array:
    """Maps normalised actions back, `a = (n + 1) (q99 - q01) / 2 + q01`.

    Args:
        unit_action: float32 `[..., A]` in [-1, 1].
        stats: quantiles; dimensions whose `action_mask` is False pass through unchanged.

    Returns:
        float32 `[..., A]`, simulator units; q01 where q01 == q99, in dimensions that pass through too.
    """
    xp = jnp if isinstance(unit_action, jax.Array) else np
    span = xp.asarray(stats.action_q99, xp.float32) - xp.asarray(stats.action_q01, xp.float32)
    raw = 0.5 * (unit_action + 1.0) * span + stats.action_q01
    return xp.where(np.asarray(stats.action_mask) | is_constant_action(stats), raw, unit_action).astype(xp.float32)


def normalize_state(state: Array, stats: NormStats) -> Array:
    """Maps raw states `[..., S]` to [-1, 1] by their quantiles, clipped; 0 where q01 == q99."""
    return _to_unit(state, stats.state_q01, stats.state_q99)


def scale_state(state: Array, stats: NormStats) -> Array:
    """Maps raw states `[..., S]` to about [-1, 1] for networks that read them as numbers.

    Differs from `normalize_state` in two ways: states are clipped at three times the data's range, so that those beyond
    it stay distinct, and no range counts as smaller than `MIN_STATE_RANGE`, so that noise of a dimension that hardly
    moves is not enlarged.
    """
    xp = jnp if isinstance(state, jax.Array) else np
    low, high = (xp.asarray(q, xp.float32) for q in (stats.state_q01, stats.state_q99))
    span = xp.maximum(high - low, MIN_STATE_RANGE)
    return xp.clip(2.0 * (state - 0.5 * (low + high)) / span, -3.0, 3.0).astype(xp.float32)


def to_quantiles(x: Array, low: Array, high: Array) -> Array:
    """Returns `2 (x - low) / (high - low + 1e-6) - 1`, openpi's normalisation: the data's range becomes [-1, 1], and
    numbers beyond it are not clipped.

    Args:
        x: float32 `[..., D]`, raw.
        low: float32 `[E]` lower quantiles, E >= D; those beyond D are not used.
        high: float32 `[E]` upper quantiles, likewise.

    Raises:
        ValueError: there are fewer quantiles than dimensions.
    """
    num_dims = x.shape[-1]
    if len(low) < num_dims or len(high) < num_dims:
        raise ValueError(f"quantiles: got {len(low)} and {len(high)}, expected at least {num_dims}")
    low, high = (np.asarray(q, np.float32)[:num_dims] for q in (low, high))
    return 2.0 * (x - low) / (high - low + QUANTILE_EPS) - 1.0


def from_quantiles(x: Array, low: Array, high: Array) -> Array:
    """Returns `(x + 1) (high - low + 1e-6) / 2 + low`, the inverse of `to_quantiles`.

    Args:
        x: float32 `[..., D]`.
        low: float32 `[E]` lower quantiles; dimensions of x beyond E, which are padding, pass through.
        high: float32 `[E]` upper quantiles.
    """
    num_dims = min(len(low), x.shape[-1])
    low, high = (np.asarray(q, np.float32)[:num_dims] for q in (low, high))
    raw = (x[..., :num_dims] + 1.0) / 2.0 * (high - low + QUANTILE_EPS) + low
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.concatenate([raw, x[..., num_dims:]], axis=-1)


def action_range(action: Mapping[str, Sequence[float]], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `NormStats.action_q01` and `action_q99`, float32 `[A]`, of the statistics of a data set.

    A dimension that is not normalised (mask False: the gripper) has its minimum and maximum there. They tell whether
    the dimension ever moves, which its quantiles do not where a gripper closes in one frame of two hundred: where
    equal quantiles are all that the file has, it is taken to move, between -1 and 1.

    Args:
        action: A numbers each of "q01", "q99" and, if the file has them, "min", "max".
        mask: bool `[A]`.
    """
    pairs = (("q01", "min"), ("q99", "max"))
    low, high = (np.where(mask, action[name], action.get(extreme, action[name])) for name, extreme in pairs)
    is_unknown = ~mask & (low == high) & ("min" not in action or "max" not in action)
    low, high = np.where(is_unknown, -1.0, low), np.where(is_unknown, 1.0, high)
    return low.astype(np.float32), high.astype(np.float32)


def is_constant_action(stats: NormStats) -> np.ndarray:
    """Returns bool `[A]`: the action dimensions in which the data never moves, q01 == q99; see `action_range`."""
    return np.asarray(stats.action_q01) == np.asarray(stats.action_q99)


def check_stats(stats: NormStats, *, action_dim: int, state_dim: int) -> None:
    """Checks that statistics fit a policy's actions and states.

    Raises:
        ValueError: they have another number of dimensions, or no action dimension moves.
    """
    for name, size in (("action_q01", action_dim), ("state_q01", state_dim)):
        if np.shape(getattr(stats, name)) != (size,):
            raise ValueError(f"norm_stats.{name}: got shape {np.shape(getattr(stats, name))}, expected ({size},)")
    if is_constant_action(stats).all():
        raise ValueError("norm_stats: got q01 equal to q99 in all action dimensions, expected one that moves")


def identity_stats(action_dim: int, state_dim: int) -> NormStats:
    """Returns statistics under which actions and states in [-1, 1] are their own normalised values."""
    return NormStats(
        action_q01=np.full(action_dim, -1.0, np.float32),
        action_q99=np.full(action_dim, 1.0, np.float32),
        action_mask=np.ones(action_dim, bool),
        state_q01=np.full(state_dim, -1.0, np.float32),
        state_q99=np.full(state_dim, 1.0, np.float32),
    )
