"""The one collector: environments in lock-step, one list of seeds, episodes in the order of the seeds."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.envs.base import VecEnv
from stare_jax.models.policy import Decision, Policy, with_prompt
from stare_jax.types import Array, Observation, PyTree, Signals, Trajectory

Act = Callable[[Observation, Signals, Sequence[str], np.ndarray], tuple[Decision, Observation]]
"""act(observation [B], signals [B], instructions [B], is_first bool [B]) -> (Decision [B], the observation to store).

Observations come raw, with empty prompts; a policy stores the one with its prompt filled in. `is_first` marks the rows
that are in the first state of an episode. Rows of environments that have nothing left to do are asked about, too; what
is decided there is not used.
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
    which records its value for bootstrapping.

    Args:
        env: B environments.
        act: who acts; see `Act`, `policy_act`.
        seeds: E seeds, one an episode.
        stop_at_success: end an episode at success instead of at the horizon.
        max_steps: actions to execute in all. Episodes under way when they are spent are cut short; the state after the
            last action is kept with its value, for bootstrapping. As many seeds suffice. None: every seed is played.
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
    num_envs, num_episodes = env.num_envs, len(seeds)
    budget = math.inf if max_steps is None else max_steps

    # Which episode each environment is in (-1: none left for it) and how many of its actions have been executed.
    episode = np.where(np.arange(num_envs) < num_episodes, np.arange(num_envs), -1)
    t = np.zeros(num_envs, int)
    num_started, num_steps, num_dropped, is_complete = min(num_envs, num_episodes), 0, 0, True
    instructions = [""] * num_episodes
    store = None
    with clock("env"):
        state = env.reset([seeds[i % num_episodes] for i in range(num_envs)], reproducible=reproducible)

    while True:
        # ---- Decide -------------------------------------------------------------------------------------------------
        is_first = (episode >= 0) & (t == 0)
        with clock("policy"):
            decision, seen = act(state.observation, state.signals, env.instructions, is_first)
        seen = seen if keep_images else seen._replace(images={})
        if store is None:
            num_rows = num_episodes if max_steps is None else num_started
            store = _allocate(num_rows, env.horizon, seen, state.signals, decision)
        elif num_started > len(store.valid):
            store = _grow(store, min(2 * num_started, num_episodes))
        for i in np.flatnonzero(is_first):
            instructions[episode[i]] = env.instructions[i]

        # ---- Record -------------------------------------------------------------------------------------------------
        is_lost = (episode >= 0) & ~state.alive
        is_live = (episode >= 0) & state.alive
        is_over = is_live & (t == env.horizon)
        if stop_at_success:
            is_over |= is_live & state.signals.success & (t > 0)
        is_acting = is_live & ~is_over
        is_acting &= np.cumsum(is_acting) <= budget - num_steps
        is_cut = is_live & ~is_over & ~is_acting
        _record_states(store, seen, state.signals, decision.value, is_live, episode, t)
        _record_actions(store, decision, is_acting, episode, t)

        # ---- Hand out the next seeds --------------------------------------------------------------------------------
        reset_seeds, is_spent = {}, num_steps + is_acting.sum() >= budget
        for i in np.flatnonzero(is_lost | is_over | is_cut):
            num_dropped += int(is_lost[i])
            if is_lost[i] or t[i] == 0:
                _erase(store, episode[i])
            if on_episode is not None:
                on_episode(int(episode[i]), jax.tree.map(lambda x, e=episode[i]: x[e], store))
            episode[i] = -1
            if num_started < num_episodes and not is_spent:
                episode[i], reset_seeds[int(i)] = num_started, seeds[num_started]
                num_started += 1
        if (episode < 0).all():
            break
        for i in np.flatnonzero((episode < 0) & ~state.alive):
            reset_seeds[int(i)] = seeds[0]  # A restarted simulator has to be reset, also where nothing is left to do.

        if should_stop is not None and should_stop():
            is_complete = False
            break

        # ---- Step ---------------------------------------------------------------------------------------------------
        executed = decision.action if perturb is None else perturb(decision.action, is_first)
        executed = np.where(is_acting[:, None], executed, np.float32(0.0)).astype(np.float32)
        with clock("env"):
            state = env.step(executed, reset_seeds, reproducible=reproducible)
        num_steps += int(is_acting.sum())
        t = np.where(is_acting, t + 1, 0)

    for e in episode[episode >= 0]:
        _erase(store, e)
    if max_steps is not None:
        store, instructions = jax.tree.map(lambda x: x[:num_started], store), instructions[:num_started]
    return Rollout(store, tuple(instructions), num_steps, num_dropped, is_complete)


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
        return jax.device_get(decision), seen

    return act


@functools.lru_cache(maxsize=16)
def _jitted_sample(sample: Callable) -> Callable:
    @jax.jit
    def sample_at(params, observation, key, tick, temperature):
        return sample(params, observation, jax.random.fold_in(key, tick), temperature=temperature)

    return sample_at


def _allocate(
    num_episodes: int, horizon: int, observation: Observation, signals: Signals, decision: Decision
) -> Trajectory:
    """Returns zeros for E episodes of N actions, shaped like one batch of what is to be recorded."""

    def zeros(length: int, batch: Array) -> np.ndarray:
        batch = np.asarray(batch)
        return np.zeros((num_episodes, length, *batch.shape[1:]), batch.dtype)

    return Trajectory(
        observation=jax.tree.map(functools.partial(zeros, horizon + 1), observation),
        signals=jax.tree.map(functools.partial(zeros, horizon + 1), signals),
        valid=np.zeros((num_episodes, horizon + 1), bool),
        action=zeros(horizon, decision.action),
        action_tokens=zeros(horizon, decision.action_tokens),
        logp=zeros(horizon, decision.logp),
        value=zeros(horizon + 1, decision.value),
    )


def _grow(store: Trajectory, num_episodes: int) -> Trajectory:
    """Returns the store with rows of zeros added; memory is taken only when they are written to."""

    def one(stored):
        grown = np.zeros((num_episodes, *stored.shape[1:]), stored.dtype)
        grown[: len(stored)] = stored
        return grown

    return jax.tree.map(one, store)


def _record_states(store, observation, signals, value, rows, episode, t) -> None:
    at = (episode[rows], t[rows])
    for stored, batch in zip(
        jax.tree.leaves((store.observation, store.signals, store.value)),
        jax.tree.leaves((observation, signals, value)),
        strict=True,
    ):
        stored[at] = batch[rows]
    store.valid[at] = True


def _record_actions(store, decision, rows, episode, t) -> None:
    at = (episode[rows], t[rows])
    store.action[at] = decision.action[rows]
    store.action_tokens[at] = decision.action_tokens[rows]
    store.logp[at] = decision.logp[rows]


def _erase(store: Trajectory, e: int) -> None:
    for stored in jax.tree.leaves(store):
        stored[e] = 0
