"""The one collector: environments in lock-step, one list of seeds, episodes in the order of the seeds."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.envs.base import EnvStep, VecEnv
from stare_jax.models.policy import Decision, Policy, with_prompt
from stare_jax.types import Array, Observation, PyTree, Signals, Trajectory

Act = Callable[[Observation, Signals, Sequence[str], np.ndarray], tuple[Decision, Observation]]
"""act(observation [B], signals [B], instructions [B], is_first bool [B]) -> (Decision [B], the observation to store).

A decision holds one action a row, `[B, A]`, or always the same number C of them, `[B, C, A]`, which are executed one
after the other before `act` is asked again. Observations come raw, with empty prompts; a policy stores the one with its
prompt filled in. `is_first` marks the rows that are in the first state of an episode; episodes begin in the order of
their seeds, within one call from the first row to the last. Rows of environments that have nothing left to do are asked
about, too; what is decided there is not used. Arrays are those of the simulator, NumPy or JAX, and what is decided may
be either.
"""


class Rollout(NamedTuple):
    """Episodes in the order of the seeds they were asked for."""

    trajectory: Trajectory
    """NumPy leaves `[E, ...]`, zeros where not valid. E is the number of seeds, or with `max_steps` of those used."""
    instructions: tuple[str, ...]
    """`[E]`; empty strings for episodes that were never started."""
    num_steps: int
    """actions executed, those of dropped episodes included."""
    num_dropped: int
    """episodes lost to a dead simulator; their rows, like those cut before their first action, have no valid state."""
    is_complete: bool
    """False where `should_stop` ended the collection early; rows of unfinished episodes have no valid state."""


def collect_episodes(
    env: VecEnv,
    act: Act,
    seeds: Sequence[int],
    *,
    stop_at_success: bool,
    max_steps: int | None = None,
    reproducible: bool = False,
    perturb: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    on_episode: Callable[[int, Trajectory], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
    keep_images: bool = True,
) -> Rollout:
    """Runs one episode per seed and returns all of them, short or long, so that no statistic is biased.

    Environment i takes the next seed of the list when its episode ends: at success (if `stop_at_success`, and after at
    least one action) or at the horizon. In the tick in which it is reset, `act` has been asked about the final state,
    which records its value for bootstrapping. What is recorded is copied to the host before the next step, which a
    simulator on a device waits for; the action goes from a policy there to such a simulator without leaving it.

    Where decisions hold C actions, all environments decide in the same tick: an episode that ends in between waits for
    the next such tick to be followed by another. What a decision is made of (tokens, log-probability, value, prompt) is
    recorded with its first action, t = 0, C, 2C .., and is zero elsewhere, but for the value at the horizon.

    Args:
        env: B environments.
        act: who acts; see `Act`, `policy_act`.
        seeds: E seeds, one an episode.
        stop_at_success: end an episode at success instead of at the horizon.
        max_steps: actions to execute in all, or up to C a row fewer. Episodes under way when they are spent are cut
            short; the state after the last action is kept with its value, for bootstrapping. As many seeds suffice.
            None: every seed is played.
        reproducible: passed to the simulator's resets.
        perturb: (action [B, A], is_first [B]) -> the action to execute instead; the one recorded stays as it was.
        on_episode: called with (e, views of row e) when an episode is over or cut short; one that is dropped, or cut
            before its first action, has no valid state.
        should_stop: polled every tick; where it answers True the collection ends, with unfinished episodes invalid.
        clock: `clock("env")` and `clock("policy")` are held while the simulator and `act` work.
        keep_images: False stores no images, for callers that need the signals alone.

    Raises:
        ValueError: no seeds, or no steps.
    """
    if not len(seeds):
        raise ValueError("seeds: got none, expected at least one episode to collect")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: got {max_steps}, expected >= 1 or None")
    seeds = [int(seed) for seed in seeds]
    clock = clock or (lambda area: contextlib.nullcontext())
    places, records = _Places(env.num_envs, len(seeds)), _Records(len(seeds), env.horizon, grows=max_steps is not None)
    decisions = _Decisions(act)
    num_left, num_dropped = math.inf if max_steps is None else max_steps, 0
    with clock("env"):
        state = env.reset([seeds[i % len(seeds)] for i in range(env.num_envs)], reproducible=reproducible)

    while True:
        # ---- Decide -------------------------------------------------------------------------------------------------
        is_first = places.is_first
        with clock("policy"):
            decision, seen = decisions.next(state, env.instructions, is_first, needs_value=places.t == env.horizon)
            recorded = jax.device_get(decision)

        # ---- Record, end episodes, hand out the next seeds ----------------------------------------------------------
        budget = num_left / decisions.chunk if decisions.is_new else math.inf
        tick = places.look_at(state, env.horizon, stop_at_success, budget)
        seen = seen if keep_images else seen._replace(images={})
        records.write(places, tick, env.instructions, *jax.device_get((seen, state.signals)), recorded)
        records.end_episodes(places, tick, on_episode)
        num_left, num_dropped = num_left - tick.is_acting.sum(), num_dropped + tick.is_lost.sum()
        is_open = decisions.are_executed and num_left >= decisions.chunk
        reset_seeds = places.hand_out(tick, state.alive, seeds, is_open=is_open)
        is_over = places.are_empty and (places.num_started == len(seeds) or num_left < decisions.chunk)
        is_complete = is_over or should_stop is None or not should_stop()
        if is_over or not is_complete:
            break

        # ---- Step ---------------------------------------------------------------------------------------------------
        # The action for a simulator on a device has not left it. To fetch the record after the step would save nothing:
        # such a simulator returns when the device is done.
        action = decision.action if isinstance(state.signals.success, jax.Array) else recorded.action
        executed = action if perturb is None else perturb(recorded.action, is_first)
        xp = executed.__array_namespace__()
        executed = xp.where(tick.is_acting[:, None], executed, xp.float32(0.0)).astype(xp.float32)
        with clock("env"):
            state = env.step(executed, reset_seeds, reproducible=reproducible)

    trajectory, instructions = records.finish(places)
    return Rollout(trajectory, instructions, records.num_steps, int(num_dropped), is_complete)


class _Decisions:
    """Asks who acts, and plays what was decided, action by action."""

    def __init__(self, act: Act):
        self._act = act
        self._decided: tuple[Decision, Observation] | None = None
        self._num_played = 0
        self.chunk = 1

    @property
    def is_new(self) -> bool:
        """Whether the last answer was a decision's first action."""
        return self._num_played == 1

    @property
    def are_executed(self) -> bool:
        """Whether the next answer will be."""
        return self._num_played == self.chunk

    def next(
        self, state: EnvStep, instructions: Sequence[str], is_first: np.ndarray, *, needs_value: np.ndarray
    ) -> tuple[Decision, Observation]:
        """Returns what is to be done in a state, one action a row, and the observation to store.

        Args:
            state: of the environments.
            instructions: of each.
            is_first: as `Act` gets it.
            needs_value: bool `[B]`, rows whose value has to be known, also where nothing new is to be decided.
        """
        is_new = self._decided is None or self.are_executed
        asked = None
        if is_new or needs_value.any():
            asked = self._act(state.observation, state.signals, instructions, is_first)
        if is_new:
            self._decided, self._num_played = asked, 0
            self.chunk = asked[0].action.shape[1] if asked[0].action.ndim == 3 else 1
        decision, seen = self._decided
        action = decision.action[:, self._num_played] if decision.action.ndim == 3 else decision.action
        self._num_played += 1
        if is_new:
            return decision._replace(action=action), seen
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), decision._replace(action=()))
        value = nothing.value if asked is None else np.where(needs_value, asked[0].value, nothing.value)
        no_prompt = {"tokens": np.zeros_like(seen.tokens), "token_mask": np.zeros_like(seen.token_mask)}
        return nothing._replace(action=action, value=value), state.observation._replace(**no_prompt)


class _Tick(NamedTuple):
    """What becomes of the episode in each environment, bool `[B]` each."""

    is_live: np.ndarray
    """its state is to be recorded"""
    is_lost: np.ndarray
    """its simulator died"""
    is_acting: np.ndarray
    """its action is to be recorded and executed"""
    is_ending: np.ndarray
    """over, cut short or lost"""


class _Places:
    """Which episode each environment is in, and how far."""

    def __init__(self, num_envs: int, num_episodes: int):
        self.num_started = min(num_envs, num_episodes)
        # -1: nothing is left to do for the environment.
        self.episode = np.where(np.arange(num_envs) < num_episodes, np.arange(num_envs), -1)
        self.t = np.zeros(num_envs, int)

    @property
    def is_first(self) -> np.ndarray:
        return (self.episode >= 0) & (self.t == 0)

    @property
    def are_empty(self) -> bool:
        return bool((self.episode < 0).all())

    def look_at(self, state: EnvStep, horizon: int, stop_at_success: bool, budget: float) -> _Tick:
        """Decides who acts; at most `budget` rows do."""
        is_live = (self.episode >= 0) & state.alive
        is_over = is_live & (self.t == horizon)
        if stop_at_success:
            is_over |= is_live & np.asarray(state.signals.success) & (self.t > 0)
        is_acting = is_live & ~is_over
        is_acting &= np.cumsum(is_acting) <= budget
        return _Tick(is_live, (self.episode >= 0) & ~state.alive, is_acting, (self.episode >= 0) & ~is_acting)

    def hand_out(self, tick: _Tick, alive: np.ndarray, seeds: Sequence[int], *, is_open: bool) -> dict[int, int]:
        """Moves on by the actions of a tick; returns the seeds of the environments to be reset.

        Args:
            tick: what became of the episodes.
            alive: bool `[B]` of the environments.
            seeds: of all episodes.
            is_open: whether episodes may begin in the next tick.
        """
        reset_seeds = {}
        self.t = np.where(tick.is_acting, self.t + 1, 0)
        self.episode[tick.is_ending] = -1
        for i in np.flatnonzero(self.episode < 0):
            if is_open and self.num_started < len(seeds):
                self.episode[i], reset_seeds[int(i)] = self.num_started, seeds[self.num_started]
                self.num_started += 1
        for i in np.flatnonzero((self.episode < 0) & ~alive):
            reset_seeds[int(i)] = seeds[0]  # A restarted simulator has to be reset, also where nothing is left to do.
        return reset_seeds


class _Records:
    """Episodes as they grow: NumPy leaves `[E, ...]`, zeros where nothing happened (yet)."""

    def __init__(self, num_episodes: int, horizon: int, *, grows: bool):
        """With `grows`, rows are added as episodes start; otherwise there is one for each from the beginning."""
        self.num_episodes, self.horizon, self.grows = num_episodes, horizon, grows
        self.instructions = [""] * num_episodes
        self.num_steps = 0
        self._store: Trajectory | None = None

    def write(
        self,
        places: _Places,
        tick: _Tick,
        instructions: Sequence[str],
        observation: Observation,
        signals: Signals,
        decision: Decision,
    ) -> None:
        """Records the states of a tick, and the actions of those who act."""
        num_rows = len(self._store.valid) if self._store is not None else 0
        if not num_rows or places.num_started > num_rows:
            wanted = max(places.num_started, 2 * num_rows) if self.grows else self.num_episodes
            self._grow(min(wanted, self.num_episodes), observation, signals, decision)
        for i in np.flatnonzero(places.is_first):
            self.instructions[places.episode[i]] = instructions[i]

        def put(stored, batch, rows):
            stored[places.episode[rows], places.t[rows]] = batch[rows]

        store = self._store
        stored, states = (store.observation, store.signals, store.value), (observation, signals, decision.value)
        jax.tree.map(functools.partial(put, rows=tick.is_live), stored, states)
        put(store.valid, tick.is_live, tick.is_live)
        stored, actions = ((x.action, x.action_tokens, x.logp) for x in (store, decision))
        jax.tree.map(functools.partial(put, rows=tick.is_acting), stored, actions)
        self.num_steps += int(tick.is_acting.sum())

    def end_episodes(self, places: _Places, tick: _Tick, on_episode: Callable | None) -> None:
        """Erases episodes that were lost, or cut before their first action, and tells who wants to know."""
        for i in np.flatnonzero(tick.is_ending):
            e = int(places.episode[i])
            if tick.is_lost[i] or places.t[i] == 0:
                self._erase(e)
            if on_episode is not None:
                on_episode(e, jax.tree.map(lambda x, e=e: x[e], self._store))

    def finish(self, places: _Places) -> tuple[Trajectory, tuple[str, ...]]:
        """Returns trajectories and instructions, without what is still under way."""
        # An episode that was handed out when the collection was stopped may have no row yet.
        num_rows = min(places.num_started, len(self._store.valid)) if self.grows else self.num_episodes
        for e in places.episode[(places.episode >= 0) & (places.episode < num_rows)]:
            self._erase(e)
        return jax.tree.map(lambda x: x[:num_rows], self._store), tuple(self.instructions[:num_rows])

    def _grow(self, num_rows: int, observation: Observation, signals: Signals, decision: Decision) -> None:
        def zeros(length: int, batch: Array) -> np.ndarray:
            batch = np.asarray(batch)
            return np.zeros((num_rows, length, *batch.shape[1:]), batch.dtype)

        grown = Trajectory(
            observation=jax.tree.map(functools.partial(zeros, self.horizon + 1), observation),
            signals=jax.tree.map(functools.partial(zeros, self.horizon + 1), signals),
            valid=np.zeros((num_rows, self.horizon + 1), bool),
            action=zeros(self.horizon, decision.action),
            action_tokens=zeros(self.horizon, decision.action_tokens),
            logp=zeros(self.horizon, decision.logp),
            value=zeros(self.horizon + 1, decision.value),
        )
        for new, old in zip(jax.tree.leaves(grown), jax.tree.leaves(self._store), strict=self._store is not None):
            new[: len(old)] = old
        self._store = grown

    def _erase(self, e: int) -> None:
        for stored in jax.tree.leaves(self._store):
            stored[e] = 0


def policy_act(
    policy: Policy, params: PyTree, key: jax.Array, *, temperature: float = 1.0, sharding: Any = None
) -> Act:
    """Returns an `Act` that samples from a policy; equal keys act equally, new parameters compile nothing.

    Args:
        policy: its `sample` is compiled once per batch size, however many actors are made.
        params: on the devices where they are to be used.
        key: consumed; tick n of the actor uses `fold_in(key, n)`.
        temperature: of the action distribution; 0 is greedy.
        sharding: where to put the observations; None leaves it to jit.
    """
    sample = _jitted_sample(policy.sample)
    ticks = itertools.count()
    temperature = np.float32(temperature)

    def act(observation, signals, instructions, is_first):
        del signals, is_first
        seen = with_prompt(policy, observation, instructions)
        placed = seen if sharding is None else jax.device_put(seen, sharding)
        decision = sample(params, placed, key, np.uint32(next(ticks)), temperature)
        return decision, seen

    return act


@functools.lru_cache(maxsize=16)
def _jitted_sample(sample: Callable) -> Callable:
    @jax.jit
    def sample_at(params, observation, key, tick, temperature):
        return sample(params, observation, jax.random.fold_in(key, tick), temperature=temperature)

    return sample_at
