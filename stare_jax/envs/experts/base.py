"""Closed-loop experts: pure functions of `Signals` and a memory, in the policy's own action space.

They decide from the present state, so they recover when another action was executed than the one they chose:
demonstrations with execution noise keep clean labels.

An expert is there to be imitated by a policy that sees one state. The built-in experts have no memory, and read nothing
that `low_dim_state` does not show. Where a decision changes from one state to the next, the change is far from the
states in which it matters, or goes on by itself: a grasp is kept while the object is held, and let go of within a
smaller distance of the goal than the one from which it would be taken up again. A motion that leads to a change does
not slow to a stop before it, where an imitation of it would come to rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stare_jax.types import Signals

ExpertFn = Callable[[Signals, Any], tuple[np.ndarray, Any]]
"""(signals of one state, memory) -> (action float32 `[A]`, memory)."""


class Expert(NamedTuple):
    """One environment's expert; loop over environments, or over the rows of a batch."""

    init: Callable[[], Any]
    """() -> the memory of an episode that begins."""
    act: ExpertFn
    """(signals of one state, memory) -> (action float32 `[A]`, memory)."""
    action_scale: tuple[float, ...]
    """`[A]`, the task's `Scene.action_scale`: the unit of noise and of the threshold for idle actions."""


def limit_translations(act: ExpertFn, limit: float, action_scale: Sequence[float]) -> ExpertFn:
    """Returns an expert's `act` with translations of at most a fraction of the largest, which keep their direction.

    Args:
        act: the expert.
        limit: the fraction, in (0, 1].
        action_scale: `[A]`, the largest command of each dimension.
    """
    longest = limit * np.array(action_scale[:3])

    def limited(signals: Signals, memory: Any) -> tuple[np.ndarray, Any]:
        action, memory = act(signals, memory)
        excess = np.abs(action[:3] / longest).max()
        action[:3] /= max(1.0, excess)
        return action, memory

    return limited


def execution_noise(
    seeds: Sequence[int], scales: Sequence[float], action_scale: Sequence[float]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `perturb(action [B, A], is_first [B])`: the action with Gaussian noise on its translation, clipped.

    The noise of an episode follows from its seed alone, whichever environment it is in.

    Args:
        seeds: one an episode, in the order in which episodes begin; rows that begin in the same call count upwards.
        scales: one an episode: standard deviation as a fraction of the action's range; 0 leaves every action as it is.
        action_scale: `[A]`, an expert's, which is that range.
    """
    span = np.array(action_scale[:3])
    episodes = zip(seeds, scales, strict=True)
    running: dict[int, tuple[np.random.Generator, float]] = {}

    def perturb(action: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        for row in np.flatnonzero(is_first):
            seed, scale = next(episodes)
            running[row] = _generator(seed, 1), scale
        perturbed = np.array(action, np.float32)
        for row, (generator, scale) in running.items():
            drawn = action[row, :3] + scale * span * generator.standard_normal(len(span))
            perturbed[row, :3] = np.clip(drawn, -span, span)
        return perturbed

    return perturb


def hesitation(
    seeds: Sequence[int], fraction: float, action_scale: Sequence[float]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `hesitate(action [B, A], is_first [B])`: the action or, at random, a pause that leaves the gripper.

    The pauses of an episode follow from its seed alone, whichever environment it is in.

    Args:
        seeds: one an episode, in the order in which episodes begin; rows that begin in the same call count upwards.
        fraction: of the actions that are pauses, in [0, 1).
        action_scale: `[A]`, an expert's; of more than three numbers the last is the gripper's.
    """
    is_moved = np.arange(len(action_scale)) < max(len(action_scale) - 1, 3)
    episodes = iter(seeds)
    running: dict[int, np.random.Generator] = {}

    def hesitate(action: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        for row in np.flatnonzero(is_first):
            running[row] = _generator(next(episodes), 2)
        action = np.array(action, np.float32)
        for row, generator in running.items():
            if generator.random() < fraction:
                action[row, is_moved] = 0.0
        return action

    return hesitate


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Returns random numbers of an episode's seed, of a stream of their own: the simulator draws the first state from
    the same seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))
