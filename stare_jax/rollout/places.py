"""The episodes that environments are in: begun one after another, each over at success or at the horizon."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stare_jax.envs.base import EnvStep


class Tick(NamedTuple):
    """The episode in each environment and the judgement of it, `[B]` each; bool where nothing else is said."""

    episode: np.ndarray
    """int, -1 where the environment has no episode."""
    t: np.ndarray
    """int, actions executed."""
    is_live: np.ndarray
    """The state is to be recorded."""
    is_lost: np.ndarray
    """The simulator died."""
    is_acting: np.ndarray
    """The action is to be recorded and executed."""
    is_ending: np.ndarray
    """The episode is over, cut short or lost."""


Spare = tuple[int, int]
"""A spare simulator: its group of environments and its number there."""


class Waiting:
    """The episodes that have not begun, some reserved for spare simulators. Groups of environments share them."""

    def __init__(self, task_of_episode: np.ndarray):
        """Lets all episodes wait, whose tasks are int `[E]`."""
        tasks = set(task_of_episode.tolist())
        self._episodes = {task: deque(np.flatnonzero(task_of_episode == task).tolist()) for task in tasks}
        self._reserved: dict[int, dict[Spare, int]] = {task: {} for task in tasks}
        """task -> spare -> episode"""
        self.num_started = 0
        self.num_rows = 0
        """Number of the last episode that has started, plus 1; with one task it is the number of those that have."""

    def take(self, task: int, spare: Spare | None = None) -> int:
        """Takes an episode of a task and returns its number; -1 where none is left.

        It is the one of `spare`, if that has reserved one, else the next, else the first that another spare has
        reserved, which may be of another group: in the end nobody waits while episodes do.
        """
        reserved = self._reserved.get(task, {})
        if spare in reserved:
            return reserved.pop(spare)
        if self._episodes.get(task):
            return self._episodes[task].popleft()
        return reserved.pop(min(reserved, key=reserved.__getitem__)) if reserved else -1

    def reserve(self, task: int, spare: Spare) -> int:
        """Returns the episode of a task that a spare has reserved, now if it had none; -1 where none is left."""
        if spare not in self._reserved.get(task, {}) and self._episodes.get(task):
            self._reserved[task][spare] = self._episodes[task].popleft()
        return self._reserved.get(task, {}).get(spare, -1)

    def begin(self, e: int) -> int:
        """Counts an episode that was taken, and returns its number; -1 is none."""
        self.num_started += e >= 0
        self.num_rows = max(self.num_rows, e + 1)
        return e

    def are_left(self, tasks: np.ndarray) -> bool:
        """Returns True if an episode of one of some tasks waits."""
        return any(self._episodes.get(task) or self._reserved.get(task) for task in tasks.tolist())


class Budget:
    """Actions that are left to execute. Groups of environments share them.

    Each of C actions that a row has been given counts as spent, for the other groups, until the row has executed it or
    the group decides again.
    """

    def __init__(self, num_actions: int | None):
        """Begins with all actions; None for any number of them."""
        self._left = math.inf if num_actions is None else num_actions
        self._promised: Counter[int] = Counter()

    def left(self, group: int) -> float:
        """Returns the actions that a group may give its rows."""
        return self._left - sum(number for other, number in self._promised.items() if other != group)

    def spend(self, group: int, num_rows: int, chunk: int | None) -> None:
        """Subtracts an action of each row that a group executes.

        Args:
            group: the group.
            num_rows: rows that act.
            chunk: C, where the group has decided now, None where it executes what it has decided before.
        """
        if chunk is not None:
            self._promised[group] = num_rows * chunk
        self._left -= num_rows
        self._promised[group] -= num_rows

    def release(self, group: int) -> None:
        """Gives back what a group has been promised, and will not execute."""
        del self._promised[group]


class Places:
    """The number of the episode in each environment of a group, and how many actions it has executed.

    An environment takes the next episode of its own task; or, where spare simulators begin episodes in advance, that of
    its spare.
    """

    def __init__(self, group: int, task_of_env: np.ndarray, waiting: Waiting, spare_of_env: np.ndarray | None):
        """Begins the first episodes.

        Args:
            group: number of the group.
            task_of_env: int `[B]`.
            waiting: episodes to take.
            spare_of_env: int `[B]`, see `VecEnv`, or None.
        """
        num_envs = len(task_of_env)
        self._waiting, self._task_of_env = waiting, task_of_env
        self._spares = None if spare_of_env is None else [(group, spare) for spare in spare_of_env.tolist()]
        self.episode = np.array([waiting.begin(waiting.take(task)) for task in task_of_env.tolist()])
        """int `[B]`, -1 where the environment has no episode."""
        self.t = np.zeros(num_envs, int)
        """int `[B]`, actions executed."""
        self._since_success = np.full(num_envs, -1)
        """int `[B]`, actions executed since the first success, -1 before it."""
        self._num_revivals = 0

    @property
    def is_first(self) -> np.ndarray:
        """bool `[B]`, True where an episode is in its first state."""
        return (self.episode >= 0) & (self.t == 0)

    @property
    def is_idle(self) -> np.ndarray:
        """bool `[B]`, True where the environment has no episode."""
        return self.episode < 0

    @property
    def are_empty(self) -> bool:
        """True where no environment has an episode."""
        return bool(self.is_idle.all())

    @property
    def are_left(self) -> bool:
        """True if episodes wait that environments here can take."""
        return self._waiting.are_left(self._task_of_env)

    def judge(self, state: EnvStep, horizon: int, *, stop_at_success: bool, linger: int, budget: float) -> Tick:
        """Decides which episodes are over, and which rows act; at most `budget` rows do.

        Args:
            state: the states that the environments are in.
            horizon: actions after which an episode is over.
            stop_at_success: end an episode at success, after at least one action.
            linger: further actions after the first success, where success ends an episode.
            budget: rows that may act.
        """
        is_live = (self.episode >= 0) & state.alive
        is_over = is_live & (self.t == horizon)
        if stop_at_success:
            is_success = np.asarray(state.signals.success) & (self.t > 0)
            begins = is_live & is_success & (self._since_success < 0)
            self._since_success = np.where(begins, 0, self._since_success)
            is_over |= is_live & (self._since_success >= linger)
        is_acting = is_live & ~is_over
        is_acting &= np.cumsum(is_acting) <= budget
        is_lost, is_ending = (self.episode >= 0) & ~state.alive, (self.episode >= 0) & ~is_acting
        return Tick(self.episode.copy(), self.t, is_live, is_lost, is_acting, is_ending)

    def hand_out(self, tick: Tick, alive: np.ndarray, seeds: Sequence[int], *, is_open: bool) -> dict[int, int]:
        """Moves on by the actions of a tick, and returns the seeds of the environments to be reset.

        Args:
            tick: judgement of the episodes.
            alive: bool `[B]` of the environments.
            seeds: seeds of all episodes.
            is_open: True if episodes may begin in the next tick.
        """
        reset_seeds = {}
        self.t = np.where(tick.is_acting, self.t + 1, 0)
        counts = tick.is_acting & (self._since_success >= 0)
        self._since_success = np.where(counts, self._since_success + 1, -1)
        self.episode[tick.is_ending] = -1
        for i in np.flatnonzero((self.episode < 0) & alive):
            if is_open and (e := self._waiting.begin(self._next(i))) >= 0:
                self.episode[i], reset_seeds[int(i)] = e, seeds[e]
        # A simulator that was lost takes an episode only after it has been reset, which may be many calls from now: an
        # episode handed to it before would be lost as well. No seed is tried twice in a row, since the seed may be the
        # reason of the loss.
        for i in np.flatnonzero((self.episode < 0) & ~alive):
            reset_seeds[int(i)] = seeds[self._num_revivals % len(seeds)]
            self._num_revivals += 1
        return reset_seeds

    def reserve(self, seeds: Sequence[int]) -> dict[int, int]:
        """Gives every spare simulator that has none an episode of its environments' task.

        Returns:
            spare -> seed of the episode that it has.
        """
        if self._spares is None:
            return {}
        tasks = dict(zip(self._spares, self._task_of_env.tolist(), strict=True))
        reserved = {spare: self._waiting.reserve(task, spare) for spare, task in tasks.items()}
        return {number: seeds[e] for (_, number), e in reserved.items() if e >= 0}

    def _next(self, i: int) -> int:
        """Takes the episode of an environment's spare, else another of its task; or -1."""
        return self._waiting.take(int(self._task_of_env[i]), self._spares[i] if self._spares else None)
