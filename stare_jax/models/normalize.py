"""Quantile normalisation of actions and states, in the convention of OpenVLA's data set statistics.

Works on NumPy arrays (and returns NumPy) as well as on JAX arrays and tracers; every function takes any leading axes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.types import Array, NormStats


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
        float32 `[..., A]`, simulator units; q01 where q01 == q99.
    """
    xp = jnp if isinstance(unit_action, jax.Array) else np
    span = xp.asarray(stats.action_q99, xp.float32) - xp.asarray(stats.action_q01, xp.float32)
    raw = 0.5 * (unit_action + 1.0) * span + stats.action_q01
    return xp.where(stats.action_mask, raw, unit_action).astype(xp.float32)


def normalize_state(state: Array, stats: NormStats) -> Array:
    """Maps raw states `[..., S]` to [-1, 1] by their quantiles, clipped; 0 where q01 == q99."""
    return _to_unit(state, stats.state_q01, stats.state_q99)


def identity_stats(action_dim: int, state_dim: int) -> NormStats:
    """Returns statistics under which actions and states in [-1, 1] are their own normalised values."""
    return NormStats(
        action_q01=np.full(action_dim, -1.0, np.float32),
        action_q99=np.full(action_dim, 1.0, np.float32),
        action_mask=np.ones(action_dim, bool),
        state_q01=np.full(state_dim, -1.0, np.float32),
        state_q99=np.full(state_dim, 1.0, np.float32),
    )
