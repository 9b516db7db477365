"""Films of an evaluation's first successes and first failures."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.sharding import pod
from stare_jax.types import Array, Signals, Trajectory


class Film(NamedTuple):
    """One episode of an evaluation with its frames; NumPy arrays."""

    episode: int
    """Index of the episode in the evaluation."""
    signals: Signals
    """Leaves `[T, ...]`."""
    valid: Array
    """bool `[T]`."""
    frames: Array | None
    """uint8 `[T, H, W, 3]` of the first camera by name; None if the simulator renders nothing or no film is wanted."""


class FilmShelf:
    """The first `num_kept` successes and the first `num_kept` failures of an evaluation, by the order of the seeds."""

    def __init__(self, num_kept: int, films: Iterable[Film] = ()):
        self._num_kept = num_kept
        self._films = {True: {}, False: {}}
        for film in films:
            self._films[_is_success(film)][film.episode] = film

    @property
    def films(self) -> list[Film]:
        """The films, in the order of the episodes."""
        films = [film for kept in self._films.values() for film in kept.values()]
        return sorted(films, key=lambda film: film.episode)

    def may_keep(self, episode: int) -> bool:
        """Returns whether an episode would be kept as a success or as a failure."""
        return any(len(kept) < self._num_kept or episode < max(kept) for kept in self._films.values())

    def put(self, film: Film) -> None:
        """Replaces an older film of the episode; keeps the new one only if it is among the first of its outcome."""
        self.drop(film.episode)
        kept = self._films[_is_success(film)]
        kept[film.episode] = film
        if len(kept) > self._num_kept:
            del kept[max(kept)]

    def gather(self) -> None:
        """Takes the films of all processes, in process 0."""
        for film in [film for films in pod.gather(self.films, on_main=True) for film in films]:
            self.put(film)

    def drop(self, episode: int) -> None:
        """Forgets an episode, if there is a film of it."""
        for kept in self._films.values():
            kept.pop(episode, None)


def film_of(episode: int, trajectory: Trajectory) -> Film:
    """Returns a film that shares no memory with the trajectory, whose leaves are `[T, ...]`."""
    images = trajectory.observation.images
    frames = np.array(images[min(images)]) if images else None
    return Film(episode, jax.tree.map(np.array, trajectory.signals), np.array(trajectory.valid), frames)


def _is_success(film: Film) -> bool:
    return bool((film.signals.success & film.valid).any())
