"""The episodes between two writes: what is lost with a simulator is run again, so that a crash changes no data set."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np

from stare_jax.rollout.collect import Rollout
from stare_jax.types import Trajectory

_log = logging.getLogger(__name__)

MAX_TRIES = 3
"""An episode whose simulator has died that often is given up: then it is the episode that kills it."""

OnEpisode = Callable[[int, Trajectory], None]
Run = Callable[[Sequence[int], OnEpisode], Rollout]
"""(indices of the episodes wanted, ascending; `on_episode` of `collect_episodes`) -> these episodes."""


def collect_chunk(
    run: Run, num_episodes: int, *, as_a_whole: bool, on_episode: Callable[[Trajectory], None]
) -> Rollout:
    """Runs episodes, and those that are lost with a simulator again.

    Args:
        run: collects some of them, by a `collect_episodes` without `max_steps`; the same ones come out the same.
        num_episodes: E.
        as_a_whole: run all again and not the lost ones alone, for actors that depend on what else is under way.
        on_episode: told of every episode once, when it is over.

    Returns:
        All E episodes in order; those of an interrupted one are not complete. `num_steps` counts the actions of all
        tries, `num_dropped` the episodes that were given up.
    """
    told: set[int] = set()

    def tell(e: int, episode: Trajectory) -> None:
        if episode.valid[0] and e not in told:
            told.add(e)
            on_episode(episode)

    every = todo = list(range(num_episodes))
    whole, num_steps = None, 0
    for num_tries in range(1, MAX_TRIES + 1):
        part = run(todo, lambda row, episode, todo=todo: tell(todo[row], episode))
        whole, num_steps = part if whole is None else _replace(whole, part, todo), num_steps + part.num_steps
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
    renewed = dict(enumerate(whole.instructions)) | dict(zip(episodes, part.instructions, strict=True))
    return whole._replace(instructions=tuple(renewed.values()), is_complete=part.is_complete)
