"""Rounds of episodes: those that are lost with a simulator are run again, so that a crash changes no result."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np

from stare_jax.rollout.collect import Rollout
from stare_jax.types import Trajectory

_log = logging.getLogger(__name__)

MAX_TRIES = 3
"""Tries of an episode before it is given up: one whose simulator dies every time probably kills it."""

OnEpisode = Callable[[int, Trajectory], None]
RunEpisodes = Callable[[Sequence[int], OnEpisode], Rollout]
"""(numbers of the episodes wanted, ascending; `on_episode` of `collect_episodes`) -> these episodes."""


def collect_round(
    run: RunEpisodes, num_episodes: int, *, as_a_whole: bool, on_episode: Callable[[Trajectory], None]
) -> Rollout:
    """Runs episodes, and runs those again that are lost with a simulator.

    Args:
        run: collects some of them, by a `collect_episodes` without `max_steps`; the same ones come out the same.
        num_episodes: E.
        as_a_whole: run all again and not the lost ones alone, for actors that depend on what else is under way.
        on_episode: called with every episode once, when it is over.

    Returns:
        All E episodes in order; those of an interrupted round are not complete. `num_steps` counts the actions of all
        tries, `num_dropped` the episodes that were given up. Images that a function chose to keep are those of the last
        try of each episode.
    """
    reported: set[int] = set()

    def report(e: int, episode: Trajectory) -> None:
        if episode.valid[0] and e not in reported:
            reported.add(e)
            on_episode(episode)

    every = todo = list(range(num_episodes))
    whole, num_steps = None, 0
    for num_tries in range(1, MAX_TRIES + 1):
        part = run(todo, lambda row, episode, todo=todo: report(todo[row], episode))
        whole = part if whole is None else _replace(whole, part, todo)
        num_steps += part.num_steps
        lost = np.flatnonzero(~whole.trajectory.valid[:, 0]).tolist()
        if not lost or not whole.is_complete:
            break
        todo = every if as_a_whole else lost
        what = f"running {len(todo)} again" if num_tries < MAX_TRIES else f"giving up after {MAX_TRIES} tries"
        _log.warning("%d of %d episodes were lost with a simulator; %s", len(lost), num_episodes, what)
    return whole._replace(num_steps=num_steps, num_dropped=len(lost))


def _replace(whole: Rollout, part: Rollout, episodes: Sequence[int]) -> Rollout:
    """Returns `whole` with some of its episodes replaced."""
    for stored, new in zip(jax.tree.leaves(whole.trajectory), jax.tree.leaves(part.trajectory), strict=True):
        stored[list(episodes)] = new
    instructions, images = list(whole.instructions), whole.images
    for e, instruction in zip(episodes, part.instructions, strict=True):
        instructions[e] = instruction
    if images is not None:
        again = {episodes[row]: kept for row, kept in part.images.items()}
        images = {e: kept for e, kept in images.items() if e not in set(episodes)} | again
    return whole._replace(instructions=tuple(instructions), images=images, is_complete=part.is_complete)
