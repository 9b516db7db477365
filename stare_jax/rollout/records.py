"""Episodes as they grow, as NumPy arrays with a row for each."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from stare_jax.models.policy import Decision
from stare_jax.rollout.places import Tick
from stare_jax.types import Array, Decisions, Observation, Signals, Trajectory

KeepImages = bool | Literal["decisions"] | Callable[[int, Trajectory], bool]
"""True or False for all episodes; "decisions", in all episodes, for the states in which decisions are made; or (e,
episode that is over) -> True if its images are to be kept."""


class Moment(NamedTuple):
    """All that one tick adds to the records; NumPy leaves `[B, ...]`."""

    instructions: Sequence[str]
    observation: Observation
    """Observations, with the prompt where decisions are made in this tick; otherwise the prompt is not read."""
    signals: Signals
    action: np.ndarray
    """float32 `[B, A]`."""
    decision: Decision | None
    """Decisions in the states of this tick, None if the actor was not called; only values count unless `is_new`."""
    is_new: bool
    """True if the decision begins in this tick."""
    chunk: int
    """C, actions of a decision."""


class Records:
    """Trajectories with leaves `[E, ...]`, zeros where nothing has happened (yet)."""

    def __init__(self, num_episodes: int, horizon: int, *, grows: bool, keep_images: KeepImages):
        """Prepares for `num_episodes`.

        Args:
            num_episodes: E.
            horizon: N.
            grows: add rows as episodes start; otherwise all E are there from the beginning.
            keep_images: episodes of which images are stored. With a function every episode has arrays of its own, which
                are freed where it answers False.
        """
        self.num_episodes, self.horizon, self.grows = num_episodes, horizon, grows
        self.instructions = [""] * num_episodes
        self.num_steps = 0
        self.images: dict[int, dict[str, np.ndarray]] = {}
        self._keep_images = keep_images
        self._store: Trajectory | None = None

    def write(self, tick: Tick, moment: Moment) -> None:
        """Records the states of a tick, the decisions made in them, and the actions that are executed."""
        observation, decision = moment.observation, moment.decision
        if self._keep_images is False or callable(self._keep_images):
            observation = observation._replace(images={})
        self._make_room(int(tick.episode.max()) + 1, moment._replace(observation=observation))
        episode, t, store = tick.episode, tick.t, self._store
        for i in np.flatnonzero((episode >= 0) & (t == 0)):
            self.instructions[episode[i]] = moment.instructions[i]

        def put(stored, batch, rows, index=t):
            stored[episode[rows], index[rows]] = batch[rows]

        seen, stored = observation, store.observation
        if not moment.is_new:
            seen, stored = (each._replace(tokens=(), token_mask=()) for each in (seen, stored))
        if not moment.is_new and self._keep_images == "decisions":
            seen, stored = (each._replace(images={}) for each in (seen, stored))
        states = (stored, store.signals), (seen, moment.signals)
        jax.tree.map(functools.partial(put, rows=tick.is_live), *states)
        put(store.valid, tick.is_live, tick.is_live)
        put(store.action, moment.action, tick.is_acting)
        if store.decisions is not None:
            decisions, number = store.decisions, -(-t // moment.chunk)
            if decision is not None:  # in every state of a new decision, otherwise in last states alone
                is_valued = tick.is_live if moment.is_new else tick.is_live & (t == self.horizon)
                put(decisions.value, decision.value, is_valued, number)
            if moment.is_new:
                made = (decisions.trace, decisions.logp), (decision.trace, decision.logp)
                jax.tree.map(functools.partial(put, rows=tick.is_acting, index=number), *made)
                put(decisions.valid, tick.is_acting, tick.is_acting, number)
        if callable(self._keep_images):
            self._write_images(tick, moment.observation.images)
        self.num_steps += int(tick.is_acting.sum())

    def end_episodes(self, tick: Tick, on_episode: Callable[[int, Trajectory], None] | None) -> None:
        """Erases episodes that were lost, or cut before their first action, and reports every episode that is over."""
        for i in np.flatnonzero(tick.is_ending):
            e = int(tick.episode[i])
            if tick.is_lost[i] or tick.t[i] == 0:
                self._erase(e)
            episode = jax.tree.map(lambda x, e=e: x[e], self._store)
            if e in self.images:
                episode = episode._replace(observation=episode.observation._replace(images=self.images[e]))
                if not self._keep_images(e, episode):
                    del self.images[e]
            if on_episode is not None:
                on_episode(e, episode)

    def finish(self, num_started: int, unfinished: Iterable[int]) -> tuple[Trajectory, tuple[str, ...]]:
        """Returns trajectories and instructions, without the episodes that are still under way.

        Args:
            num_started: number of the last episode that has started, plus 1.
            unfinished: numbers of the episodes that are under way.
        """
        # An episode that was handed out when the collection was stopped may have no row yet.
        num_rows = min(num_started, len(self._store.valid)) if self.grows else self.num_episodes
        for e in unfinished:
            if e < num_rows:
                self._erase(e)
        return jax.tree.map(lambda x: x[:num_rows], self._store), tuple(self.instructions[:num_rows])

    def _make_room(self, num_needed: int, moment: Moment) -> None:
        """Adds rows where there are fewer than are needed for the episodes that have started."""
        num_rows = len(self._store.valid) if self._store is not None else 0
        if num_rows and num_needed <= num_rows:
            return
        num_rows = min(max(num_needed, 2 * num_rows), self.num_episodes) if self.grows else self.num_episodes
        shapes = self._store if self._store is not None else _shapes_of_episodes(moment, self.horizon)
        grown = jax.tree.map(lambda x: np.zeros((num_rows, *x.shape[1:]), x.dtype), shapes)
        for new, old in zip(jax.tree.leaves(grown), jax.tree.leaves(self._store), strict=self._store is not None):
            new[: len(old)] = old
        self._store = grown

    def _write_images(self, tick: Tick, images: dict[str, np.ndarray]) -> None:
        for i in np.flatnonzero(tick.is_live):
            e, t = int(tick.episode[i]), tick.t[i]
            if t == 0:
                self.images[e] = {
                    name: np.zeros((self.horizon + 1, *image.shape[1:]), image.dtype) for name, image in images.items()
                }
            for name, image in images.items():
                self.images[e][name][t] = image[i]

    def _erase(self, e: int) -> None:
        self.images.pop(e, None)
        for stored in jax.tree.leaves(self._store):
            stored[e] = 0


def _shapes_of_episodes(moment: Moment, horizon: int) -> Trajectory:
    """Returns jax.ShapeDtypeStruct leaves `[B, ...]` of the episodes that begin with the states of a tick."""
    decision, num_decisions = moment.decision, -(-horizon // moment.chunk)

    def over(length: int, batch: Array) -> jax.ShapeDtypeStruct:
        batch = np.asarray(batch)
        return jax.ShapeDtypeStruct((len(batch), length, *batch.shape[1:]), batch.dtype)

    decisions = None
    if decision.logp is not None:
        decisions = Decisions(
            trace=jax.tree.map(functools.partial(over, num_decisions), decision.trace),
            logp=over(num_decisions, decision.logp),
            value=over(num_decisions + 1, decision.value),
            valid=over(num_decisions, np.zeros(len(decision.logp), bool)),
        )
    return Trajectory(
        observation=jax.tree.map(functools.partial(over, horizon + 1), moment.observation),
        signals=jax.tree.map(functools.partial(over, horizon + 1), moment.signals),
        valid=over(horizon + 1, np.zeros(len(moment.action), bool)),
        action=over(horizon, moment.action),
        decisions=decisions,
    )
