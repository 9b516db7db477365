"""Potential-based shaping of the rewards of one episode of N actions (equation 5)."""

import typing
from typing import Literal

import chex
import jax.numpy as jnp

from stare_jax.types import Array

TerminalPotential = Literal["keep", "zero"]
"""Phi of the state after which nothing follows: "keep" is its own, as equation 5 stands; "zero" is 0."""

TimeLimit = Literal["terminate", "bootstrap"]
"""End of an episode at its horizon: "terminate" lets nothing follow, "bootstrap" the value of the last state."""


def check_ends(terminal_potential: TerminalPotential, time_limit: TimeLimit) -> None:
    """Checks that shaping leaves success better than waiting.

    With "zero" and "bootstrap" the value of the last state hands on the potential of the goal region, which is near 1,
    while success, after which the potential counts as 0, is worth 1 as well: waiting is as good as success.

    Raises:
      ValueError: the two are combined.
    """
    if (terminal_potential, time_limit) == ("zero", "bootstrap"):
        raise ValueError(
            "shaping, terminal_potential, time_limit: got True, 'zero', 'bootstrap', expected terminal_potential "
            "'keep' or time_limit 'terminate': otherwise waiting near the goal is worth as much as success"
        )


def shape_rewards(
    reward_t: Array,
    potential_t: Array,
    next_potential_t: Array,
    discount_t: Array,
    *,
    gamma: Array | float,
    terminal_potential: TerminalPotential = "zero",
) -> Array:
    """Returns r'_t = r_t + gamma Phi(s_{t+1}) - Phi(s_t) (5), float32 `[N]`, t = 0 .. N-1.

    With "zero", Phi(s_{t+1}) counts as 0 where `discount_t` is 0. This leaves the optimal policy as it is (Ng et al.,
    1999), and the advantages are those of PPO without shaping and with the critic V + Phi (Wiewiora, 2003). With
    "keep" every episode is paid gamma^N Phi(s_N) at its end: a failure is graded by how far it came. That changes the
    objective; success remains the best. `PPOConfig` trains with "keep".

    Args:
      reward_t: `[N]` r_t.
      potential_t: `[N]` Phi(s_t).
      next_potential_t: `[N]` Phi(s_{t+1}) of the state that a_t led to, also where the simulator has reset since.
      discount_t: `[N]` 0 after a true termination, else gamma.
      gamma: discount factor of one step, or of each, `[N]`.
      terminal_potential: "zero" or "keep".

    Raises:
      ValueError: `terminal_potential` is neither.

    Differs from the paper: which does not say what Phi is after the last state.
    """
    arrays = (reward_t, potential_t, next_potential_t, discount_t)
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, float)
    if terminal_potential not in (allowed := typing.get_args(TerminalPotential)):
        raise ValueError(f"terminal_potential is {terminal_potential!r}, expected one of {allowed}.")
    reward_t, potential_t, next_potential_t, discount_t = (jnp.asarray(array, jnp.float32) for array in arrays)
    if terminal_potential == "zero":
        next_potential_t = jnp.where(discount_t == 0, 0.0, next_potential_t)
    return reward_t + gamma * next_potential_t - potential_t
