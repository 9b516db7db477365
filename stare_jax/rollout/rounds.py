"""Rounds of episodes, which processes share: those that are lost with a simulator are run again, so that a crash
changes no result."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np

from stare_jax.rollout.collect import Rollout, get_episode
from stare_jax.sharding import pod
from stare_jax.types import PyTree, Trajectory

_log = logging.getLogger(__name__)

MAX_TRIES = 3
"""Tries of an episode before it is given up: one whose simulator dies every time probably kills it."""

OnEpisode = Callable[[int, Trajectory], None]
RunEpisodes = Callable[[Sequence[int], OnEpisode], Rollout]
"""(numbers of the episodes wanted, ascending; `on_episode` of `collect_episodes`) -> these episodes."""


def collect_round(
    run: RunEpisodes, num_episodes: int, *, as_a_whole: bool, on_episode: Callable[[Trajectory], None]
) -> Rollout:
    """Runs episodes, and runs those again that are lost with a simulator. Each process runs its part of them.

    Args:
        run: collects some of them, by a `collect_episodes` without `max_steps`; the same ones come out the same.
        num_episodes: E.
        as_a_whole: run all again and not the lost ones alone, for actors that depend on what else is under way.
        on_episode: called with every episode of this process once, when it is over, and in process 0 with the others.

    Returns:
        All E episodes in order, in process 0 with all images; those of an interrupted round are not complete.
        `num_steps` counts the actions of all tries, `num_dropped` the episodes that were given up. Images that a
        function chose to keep are those of the last try of each episode, and stay in its process.
    """
    reported: set[int] = set()

    def report(e: int, episode: Trajectory) -> None:
        if episode.valid[0] and e not in reported:
            reported.add(e)
            on_episode(episode)

    every = todo = list(pod.share(range(num_episodes)))
    whole, num_steps, lost = None, 0, []
    for num_tries in range(1, MAX_TRIES + 1) if every else ():
        part = run(todo, lambda row, episode, todo=todo: report(todo[row], episode))
        whole = part if whole is None else _replace(whole, part, [e - every[0] for e in todo])
        num_steps += part.num_steps
        lost = (every[0] + np.flatnonzero(~whole.trajectory.valid[:, 0])).tolist()
        if not lost or not whole.is_complete:
            break
        todo = every if as_a_whole else lost
        what = f"running {len(todo)} again" if num_tries < MAX_TRIES else f"giving up after {MAX_TRIES} tries"
        _log.warning("%d of %d episodes were lost with a simulator; %s", len(lost), len(every), what)
    whole = None if whole is None else whole._replace(num_steps=num_steps, num_dropped=len(lost))
    if pod.num_processes() == 1:
        return whole
    whole = _join_round(whole)
    for e in range(num_episodes) if pod.is_main() and whole.is_complete else ():
        if e not in every and whole.trajectory.valid[e, 0]:
            on_episode(get_episode(whole, e))
    return whole


def _join_round(own: Rollout | None) -> Rollout:
    """Returns the episodes of all processes, of which those without any give None; images in process 0 alone."""
    images = None if own is None else own.trajectory.observation.images
    drawn = pod.gather(images, on_main=True)
    small = None if own is None else _with_images(own, {})
    whole = join_rollouts([part for part in pod.gather(small) if part is not None])
    if not pod.is_main():
        return whole
    drawn = [images for images in drawn if images is not None]
    return _with_images(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *drawn))


def _with_images(rollout: Rollout, images: PyTree) -> Rollout:
    seen = rollout.trajectory.observation._replace(images=images)
    return rollout._replace(trajectory=rollout.trajectory._replace(observation=seen), images=None)


def gather_rollout(rollout: Rollout) -> Rollout:
    """Returns the episodes of all processes without observations, actions and traces, which are large: for metrics."""
    if pod.num_processes() == 1:
        return rollout
    trajectory = rollout.trajectory
    decisions = trajectory.decisions._replace(trace={}, logp=None)
    small = trajectory._replace(observation=None, action=None, decisions=decisions)
    return join_rollouts(pod.gather(rollout._replace(trajectory=small, images=None)))


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Returns rollouts one after the other as one; without the images that a function chose to keep."""
    trajectory, task, handover = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *((part.trajectory, part.task, part.handover) for part in parts)
    )
    return Rollout(
        trajectory,
        tuple(text for part in parts for text in part.instructions),
        task,
        num_steps=sum(part.num_steps for part in parts),
        num_dropped=sum(part.num_dropped for part in parts),
        is_complete=all(part.is_complete for part in parts),
        handover=handover,
    )


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
