"""One episode over time: stage, potential and reward of every step, as training would have seen it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.stages import TaskSpec, potentials, separate, shape_rewards, success_rewards
from stare_jax.types import Array, Signals


class Timeline(NamedTuple):
    """NumPy arrays over the T valid states of one episode, N = T - 1 actions."""

    stage_t: Array
    """int32 `[T]` label."""
    potential_t: Array
    """float32 `[T]` in [0, 1]."""
    success_t: Array
    """bool `[T]`."""
    reward_t: Array
    """float32 `[N]`; NaN after the first success, where training would have stopped."""
    shaped_reward_t: Array
    """float32 `[N]`: reward_t + gamma potential_{t+1} - potential_t, NaN likewise."""


def trace_episode(spec: TaskSpec, signals: Signals, valid: Array, *, gamma: float = 0.99) -> Timeline:
    """Returns the timeline of one episode.

    Args:
        spec: the task.
        signals: leaves `[T, ...]`.
        valid: bool `[T]`, a prefix with at least one state.
        gamma: discount of the shaped reward.

    Raises:
        ValueError: the episode has no valid state, as when its simulator died.
    """
    num_states = int(np.asarray(valid).sum())
    if num_states == 0:
        raise ValueError("valid: got no valid state, expected at least one; the episode was lost")
    stage_t, potential_t, success_t, reward_t, shaped_t = (
        np.array(series) for series in _trace_fn(spec)(signals, valid, np.float32(gamma))
    )
    is_after = np.cumsum(reward_t) - reward_t > 0
    reward_t[is_after] = shaped_t[is_after] = np.nan
    return Timeline(
        stage_t[:num_states],
        potential_t[:num_states],
        success_t[:num_states],
        reward_t[: num_states - 1],
        shaped_t[: num_states - 1],
    )


@functools.lru_cache(maxsize=16)
def _trace_fn(spec: TaskSpec) -> Callable:
    @jax.jit
    def trace(signals, valid, gamma):
        separation = separate(spec, signals, valid)
        potential_t = potentials(spec, signals, separation)
        reward_t = success_rewards(signals.success, valid)
        discount_t = jnp.where(reward_t > 0, 0.0, gamma)
        shaped_t = shape_rewards(reward_t, potential_t[:-1], potential_t[1:], discount_t, gamma=gamma)
        return separation.stage_t, potential_t, signals.success, reward_t, shaped_t

    return trace
