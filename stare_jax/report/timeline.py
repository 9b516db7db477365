"""One episode over time: stage and potential of every state, rewards of every action as training pays them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.stages import TaskSpec, potentials, separate
from stare_jax.types import Array, Signals


class Rewards(NamedTuple):
    """Rewards of the N actions of one episode in training; NaN for actions that training does not see."""

    reward_t: Array
    """float32 `[N]` r_t."""
    shaped_reward_t: Array
    """float32 `[N]` r'_t (5); r_t where training does not shape."""


RewardsFn = Callable[[Signals, Array], Rewards]
"""(signals with leaves `[T, ...]`, valid bool `[T]`) -> rewards of the T - 1 actions in training."""


class Timeline(NamedTuple):
    """NumPy arrays over the T valid states of one episode, N = T - 1 actions."""

    stage_t: Array
    """int32 `[T]` label."""
    potential_t: Array
    """float32 `[T]` in [0, 1]."""
    success_t: Array
    """bool `[T]`."""
    reward_t: Array
    """float32 `[N]`; NaN where training has stopped."""
    shaped_reward_t: Array
    """float32 `[N]`, NaN likewise."""


def trace_episode(spec: TaskSpec, signals: Signals, valid: Array, rewards_fn: RewardsFn) -> Timeline:
    """Returns the timeline of one episode.

    Args:
        spec: the task.
        signals: leaves `[T, ...]`.
        valid: bool `[T]`, a prefix with at least one state.
        rewards_fn: rewards of training, as `runs.evaluation.training_rewards` makes them from a PPO configuration.

    Raises:
        ValueError: the episode has no valid state, as when it was lost with its simulator.
    """
    num_states = int(np.asarray(valid).sum())
    if num_states == 0:
        raise ValueError("valid: got no valid state, expected at least one; the episode was lost")
    stage_t, potential_t = jax.device_get(_trace_fn(spec)(signals, valid))
    rewards = rewards_fn(signals, valid)
    return Timeline(
        stage_t[:num_states],
        potential_t[:num_states],
        np.asarray(signals.success)[:num_states],
        np.asarray(rewards.reward_t)[: num_states - 1],
        np.asarray(rewards.shaped_reward_t)[: num_states - 1],
    )


@functools.lru_cache(maxsize=16)
def _trace_fn(spec: TaskSpec) -> Callable:
    @jax.jit
    def trace(signals, valid):
        separation = separate(spec, signals, valid)
        return separation.stage_t, potentials(spec, signals, separation)

    return trace
