"""Rewards of one episode of N actions: the sparse one, and the potential-based shaping of it (equation 5)."""

import chex
import jax.numpy as jnp

from stare_jax.stages import measures
from stare_jax.types import Array


def shape_rewards(
    reward_t: Array,
    potential_t: Array,
    next_potential_t: Array,
    discount_t: Array,
    *,
    gamma: Array | float,
    terminal_potential: str = "zero",
) -> Array:
    """Returns r'_t = r_t + gamma Phi(s_{t+1}) - Phi(s_t) (5), float32 `[N]`, t = 0 .. N-1.

    At a true termination, where `discount_t` is 0, Phi(s_{t+1}) counts as 0: the condition under which shaping leaves
    the optimal policy as it is (Ng et al., 1999). At a time limit the real next state's potential is kept.

    Args:
      reward_t: `[N]` r_t.
      potential_t: `[N]` Phi(s_t).
      next_potential_t: `[N]` Phi(s_{t+1}) of the state that a_t led to, also where the simulator has reset since.
      discount_t: `[N]` 0 after a true termination, else gamma.
      gamma: discount factor of one step, or of each, `[N]`.
      terminal_potential: "zero", or "keep" to use the real next potential at a termination too.

    Raises:
      ValueError: `terminal_potential` is neither.

    Differs from the paper: which does not say what Phi is after the last state.
    """
    arrays = (reward_t, potential_t, next_potential_t, discount_t)
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, float)
    if terminal_potential not in ("zero", "keep"):
        raise ValueError(f"terminal_potential is {terminal_potential!r}, expected 'zero' or 'keep'.")
    reward_t, potential_t, next_potential_t, discount_t = (jnp.asarray(array, jnp.float32) for array in arrays)
    if terminal_potential == "zero":
        next_potential_t = jnp.where(discount_t == 0, 0.0, next_potential_t)
    return reward_t + gamma * next_potential_t - potential_t


def success_rewards(success: Array, valid: Array | None = None) -> Array:
    """Returns r_t = 1 at the first step whose next state is a success, else 0, float32 `[N]`.

    Args:
      success: bool `[T]` of the T = N + 1 states.
      valid: bool `[T]` which states exist; None for all.
    """
    chex.assert_rank(success, 1)
    chex.assert_type(success, bool)
    success = jnp.asarray(success) & measures.as_valid(valid, success.shape[0])
    num_successes = jnp.cumsum(success[1:])
    return (success[1:] & (num_successes == 1)).astype(jnp.float32)
