"""Films of episodes: frames of episodes under way, of which those of the first successes and failures are kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.envs.base import EnvStep, VecEnv
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
    """uint8 `[T, H, W, 3]` of the first camera by name; None where nothing is rendered or nothing is to be filmed."""


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
        """Replaces what is kept of this episode; keeps the film only if it is among the first of its outcome."""
        self.drop(film.episode)
        kept = self._films[_is_success(film)]
        kept[film.episode] = film
        if len(kept) > self._num_kept:
            del kept[max(kept)]

    def drop(self, episode: int) -> None:
        """Forgets an episode, if there is a film of it."""
        for kept in self._films.values():
            kept.pop(episode, None)


class Camera:
    """A `VecEnv` that keeps the frames of the episodes under way, of each only as long as it may still be wanted.

    The frames of at most B episodes are kept at a time, however many the evaluation has.
    """

    def __init__(self, env: VecEnv, is_wanted: Callable[[int], bool]):
        """Wraps an environment; `is_wanted(seed)` says whether an episode may be filmed."""
        self._env, self._is_wanted = env, is_wanted
        self._seeds: dict[int, int] = {}
        self._frames: dict[int, list[np.ndarray]] = {}

    def __getattr__(self, name: str):
        return getattr(self._env, name)

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        return self._record(self._env.reset(seeds, reproducible=reproducible), dict(enumerate(seeds)))

    def step(
        self, action: Array, reset_seeds: Mapping[int, int] | None = None, *, reproducible: bool = False
    ) -> EnvStep:
        state = self._env.step(action, reset_seeds, reproducible=reproducible)
        return self._record(state, reset_seeds or {})

    def frames(self, seed: int, num_states: int) -> np.ndarray | None:
        """Returns the frames of an episode that has just ended, uint8 `[T, H, W, 3]`; None where there are none."""
        for row, frames in self._frames.items():
            if self._seeds[row] == seed and len(frames) == num_states:
                return np.stack(frames)
        return None

    def _record(self, state: EnvStep, new_seeds: Mapping[int, int]) -> EnvStep:
        for row, seed in new_seeds.items():
            self._seeds[row], self._frames[row] = seed, []
        images, most = state.observation.images, self._env.horizon + 1
        rows = [row for row, frames in self._frames.items() if images and len(frames) < most]
        unwanted = [row for row in rows if not self._is_wanted(self._seeds[row])]
        for row in unwanted:
            self._frames[row] = []
        if wanted := sorted(set(rows) - set(unwanted)):
            pictures = jax.device_get(images[min(images)])
            for row in wanted:
                self._frames[row].append(pictures[row].copy())  # A view would keep the pictures of all rows.
        return state


def film_of(episode: int, trajectory: Trajectory, frames: np.ndarray | None) -> Film:
    """Returns a film that shares no memory with the trajectory, whose leaves are `[T, ...]`."""
    return Film(episode, jax.tree.map(np.array, trajectory.signals), np.array(trajectory.valid), frames)


def _is_success(film: Film) -> bool:
    return bool((film.signals.success & film.valid).any())
