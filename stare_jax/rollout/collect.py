"""The one collector: environments in lock-step, or groups of them that take turns; one list of seeds, whose order is
that of the episodes."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.envs.base import EnvStep, SimulatorError, VecEnv
from stare_jax.logging import Clock
from stare_jax.models.policy import Decision
from stare_jax.rollout.decisions import Act, Chunk
from stare_jax.rollout.finite import check_actions, check_states
from stare_jax.rollout.places import Budget, Places, Waiting
from stare_jax.rollout.records import KeepImages, Moment, Records
from stare_jax.types import Array, Observation, Trajectory

MAX_DEAD_CALLS = 100
"""Calls of simulators in a row that may leave no environment alive, before a collection gives up."""


class Rollout(NamedTuple):
    """Episodes in the order of the seeds they were asked for."""

    trajectory: Trajectory
    """NumPy leaves `[E, ...]`, zeros where not valid. E is the number of seeds, or with `max_steps` of those used."""
    instructions: tuple[str, ...]
    """`[E]`; empty strings for episodes that were never started."""
    task: np.ndarray
    """int32 `[E]`, the index of each episode's task; 0 where there is one task."""
    num_steps: int
    """Number of actions executed, those of dropped episodes included."""
    num_dropped: int
    """Number of episodes lost to a dead simulator; their rows, like those cut before their first action, have no valid
    state."""
    is_complete: bool
    """False where `should_stop` ended the collection early; rows of unfinished episodes have no valid state."""
    images: dict[int, dict[str, np.ndarray]] | None = None
    """e -> camera -> uint8 `[N + 1, H, W, 3]` of the episodes whose images a function chose to keep; `trajectory` has
    none then. None where all episodes or none have theirs."""
    handover: np.ndarray | None = None
    """int32 `[E]`, the stage from which on the policy acted in each episode, 0 from the first state on (`jump_start`);
    None: 0 in all."""


def collect_episodes(
    env: VecEnv,
    act: Act,
    seeds: Sequence[int],
    *,
    stop_at_success: bool,
    tasks: Sequence[int] | None = None,
    linger: int = 0,
    max_steps: int | None = None,
    reproducible: bool = False,
    perturb: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    on_episode: Callable[[int, Trajectory], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Clock | None = None,
    keep_images: KeepImages = True,
    in_turns: bool = False,
) -> Rollout:
    """Runs one episode per seed and returns all of them, short or long, so that no statistic is biased.

    Environment i takes the next seed of the list, or the next of its own task, when its episode ends: at success (if
    `stop_at_success`, and after at least one action) or at the horizon. In the tick in which it is reset, `act` has
    been called for the final state, which records its value for bootstrapping. Records are written while the simulators
    work; the action goes from a policy on a device to a simulator there without leaving it.

    An environment without an episode, because no seed is left or the next decision is not due, is idle until it is
    reset (see `VecEnv`).

    Where decisions hold C actions, all environments decide in the same tick: an episode that ends in between waits for
    the next such tick to be followed by another.

    Groups of environments that take turns are each in lock-step, and take episodes from one list: while the simulators
    of one work, `act` decides for another, and while it decides on C actions the others play theirs. Which episode
    begins where follows from the episodes alone, so that equal
    seeds and keys give equal rollouts for one number of groups. Another number gives the same episodes to actors for
    which rows do not depend on what else is in a call or on the number of calls before it; those that draw random
    numbers for a batch draw others. Spare simulators, which begin episodes in advance, change their order alone.

    Args:
        env: B environments.
        act: the actor; see `Act`, `policy_act`.
        seeds: E seeds, one an episode.
        stop_at_success: end an episode at success instead of at the horizon.
        tasks: `[E]`, the task of each episode, an index as in `env.task_index`; None where all are of one task, and any
            environment takes any of them.
        linger: actions after the first success before it ends the episode; 0 without `stop_at_success`.
        max_steps: actions to execute in all, or up to C a row fewer. Episodes under way when they are spent are cut
            short; the state after the last action is kept with its value, for bootstrapping. As many seeds suffice.
            With several tasks, or spare simulators, rows of episodes that have not begun may lie between others; they
            have no valid state.
            None: every seed is played.
        reproducible: passed to the simulator's resets. The first one of every environment, and of every spare
            simulator, is reproducible in any case: no collection depends on what was simulated before it.
        perturb: (action [B, A], is_first [B]) -> the action to execute instead; the one recorded stays as it was.
        on_episode: called with (e, views of row e) when an episode is over or cut short; one that is dropped, or cut
            before its first action, has no valid state.
        should_stop: polled every tick; where it answers True the collection ends, with unfinished episodes invalid.
        clock: `clock("env")` and `clock("policy")` are held while the simulator and `act` work.
        keep_images: False stores no images, "decisions" those of states in which decisions are made; simulators then
            need not draw the others. A function (e, episode) -> bool is called when an episode is over, and
            frees its images where it answers False: memory holds those of the episodes under way and of those kept.
        in_turns: groups of environments, `env.groups`, take turns. For actors that remember nothing of an environment
            from call to call, as experts do.

    Raises:
        ValueError: no seeds, no steps, a task without an environment, or `linger` without `stop_at_success`.
        FloatingPointError: a state or an action is not finite; names the episode.
        SimulatorError: no environment is alive after `MAX_DEAD_CALLS` calls in a row, and episodes are still to begin.
    """
    if not len(seeds):
        raise ValueError("seeds: got none, expected at least one episode to collect")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: got {max_steps}, expected >= 1 or None")
    if linger < 0 or (linger and not stop_at_success):
        raise ValueError(f"linger: got {linger}, expected >= 0, and 0 without stop_at_success")
    task_of_episode = np.zeros(len(seeds), np.int32) if tasks is None else np.asarray(tasks, np.int32)
    tasks_of_envs = [0] if tasks is None else np.asarray(env.task_index).tolist()
    if missing := set(task_of_episode.tolist()) - set(tasks_of_envs):
        raise ValueError(f"tasks: got {sorted(missing)}, expected tasks of environments: {tasks_of_envs}")
    collection = _Collection(
        act=act,
        seeds=[int(seed) for seed in seeds],
        end={"stop_at_success": stop_at_success, "linger": linger},
        reproducible=reproducible,
        perturb=perturb,
        on_episode=on_episode,
        should_stop=should_stop,
        clock=clock or Clock(),
        keep_images=keep_images,
        waiting=Waiting(task_of_episode),
        budget=Budget(max_steps),
        records=Records(len(seeds), env.horizon, grows=max_steps is not None, keep_images=keep_images),
    )
    turns: deque[Iterator[bool]] = deque()
    under_way: list[Places] = []
    # Every environment takes its first episode before a spare simulator reserves any.
    for number, group in enumerate(env.groups if in_turns else [env]):
        task_of_env = np.zeros(group.num_envs, int) if tasks is None else np.asarray(group.task_index)
        if collection.waiting.are_left(task_of_env):
            spares = group.spare_of_env if in_turns else None
            under_way.append(Places(number, task_of_env, collection.waiting, spares))
            turns.append(collection.play(number, group, under_way[-1]))
    collection.take_turns(turns)

    records, num_rows = collection.records, collection.waiting.num_rows
    unfinished = [e for places in under_way for e in places.episode.tolist() if e >= 0]
    trajectory, instructions = records.finish(num_rows, unfinished)
    images = records.images if callable(keep_images) else None
    num_dropped, is_complete = collection.num_dropped, not collection.is_stopped
    task = task_of_episode[: len(instructions)]
    return Rollout(trajectory, instructions, task, records.num_steps, num_dropped, is_complete, images)


@dataclasses.dataclass
class _Collection:
    """State that groups of environments share; the fields without a text are arguments of `collect_episodes`."""

    act: Act
    seeds: list[int]
    end: dict[str, Any]
    """options of `Places.judge`"""
    reproducible: bool
    perturb: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    on_episode: Callable[[int, Trajectory], None] | None
    should_stop: Callable[[], bool] | None
    clock: Clock
    keep_images: KeepImages
    waiting: Waiting
    """episodes that have not begun"""
    budget: Budget
    records: Records
    num_dropped: int = 0
    is_stopped: bool = False

    def take_turns(self, turns: deque[Iterator[bool]]) -> None:
        """Resumes the groups' `play` one after the other, those whose policy is deciding only when all others are, too.

        The order follows from the episodes alone, and not from time, so that collections repeat.
        """
        deciding: deque[Iterator[bool]] = deque()
        while (turns or deciding) and not self.is_stopped:
            loop = (turns or deciding).popleft()
            if (is_deciding := next(loop, None)) is not None:
                (deciding if is_deciding else turns).append(loop)

    def play(self, group: int, env: VecEnv, places: Places) -> Iterator[bool]:
        """Runs episodes in one group of environments, and pauses: at False its simulators work, at True its policy
        decides on several actions, and other groups may play all of theirs meanwhile."""
        chunk, num_dead, rebuilds, budget = None, 0, True, self.budget
        with self.clock("env"):
            first = [self.seeds[e if e >= 0 else i % len(self.seeds)] for i, e in enumerate(places.episode)]
            state = env.reset(first, reproducible=rebuilds)

        while True:
            # Simulators that start again are waited for, but not without end.
            num_dead = 0 if state.alive.any() else num_dead + 1
            if num_dead > MAX_DEAD_CALLS:
                raise SimulatorError(
                    f"{env.env_id}: none of {env.num_envs} environments came back alive in {num_dead} calls in a row; "
                    f"{len(self.seeds) - self.waiting.num_started} of {len(self.seeds)} episodes wait to begin"
                )

            # ---- Decide; instructions are those of now, as `send` changes them --------------------------------------
            is_new, is_first, instructions = chunk is None or chunk.is_over, places.is_first, tuple(env.instructions)
            decision, seen = self.decide(env, state, places, instructions, is_new)
            if is_new:
                if decision.action.ndim > 2 and not isinstance(decision.action, np.ndarray):
                    yield True
                with self.clock("policy"):
                    chunk = Chunk(decision)
                decision = chunk.decision
            action, recorded_action = chunk.next()

            # ---- Judge, hand out the next seeds ---------------------------------------------------------------------
            most = budget.left(group) / chunk.size if is_new else math.inf
            tick = places.judge(state, env.horizon, budget=most, **self.end)
            budget.spend(group, int(tick.is_acting.sum()), chunk.size if is_new else None)
            is_open = chunk.is_over and budget.left(group) >= chunk.size
            reset_seeds = places.hand_out(tick, state.alive, self.seeds, is_open=is_open)
            is_over = places.are_empty and not (places.are_left and budget.left(group) >= chunk.size)

            # ---- Step; record and end episodes while simulators work ------------------------------------------------
            if not is_over:
                check_actions(recorded_action, state, tick, self.seeds)
                executed = self.executed(action, recorded_action, state, tick.is_acting, is_first)
                self.send(env, places, executed, reset_seeds, rebuilds, is_drawn=chunk.is_over)
                rebuilds = self.reproducible  # Spare simulators have begun their first episodes, too.
            seen = seen if self.keep_images else seen._replace(images={})
            observation, signals = jax.device_get((seen, state.signals))
            check_states(observation.state, signals, tick, self.seeds)
            moment = Moment(instructions, observation, signals, recorded_action, decision, is_new, chunk.size)
            self.records.write(tick, moment)
            self.records.end_episodes(tick, self.on_episode)
            self.num_dropped += int(tick.is_lost.sum())
            is_asked = not is_over and self.should_stop is not None and self.should_stop()
            self.is_stopped = self.is_stopped or is_asked
            if is_over or self.is_stopped:
                budget.release(group)
                return
            yield False
            with self.clock("env"):
                state = env.receive()

    def decide(
        self, env: VecEnv, state: EnvStep, places: Places, instructions: tuple[str, ...], is_new: bool
    ) -> tuple[Decision | None, Observation]:
        """Returns a decision, which a device may still be at, and what the actor has seen.

        Within a chunk only the value of last states is asked for.
        """
        shown = _observed(state)
        with self.clock("policy"):
            if is_new:
                return self.act(shown, state.signals, instructions, places.is_first)
            if (places.t == env.horizon).any():
                decided, _ = self.act(shown, state.signals, instructions, places.is_first)
                return jax.device_get(decided), shown
        return None, shown

    def executed(
        self, action: Array, recorded_action: np.ndarray, state: EnvStep, is_acting: np.ndarray, is_first: np.ndarray
    ) -> Array:
        """Returns the actions that simulators take; those for one on a device have not left it."""
        executed = action if isinstance(state.signals.success, jax.Array) else recorded_action
        executed = executed if self.perturb is None else self.perturb(recorded_action, is_first)
        xp = executed.__array_namespace__()
        return xp.where(is_acting[:, None], executed, xp.float32(0.0)).astype(xp.float32)

    def send(
        self,
        env: VecEnv,
        places: Places,
        executed: Array,
        reset_seeds: dict[int, int],
        rebuilds: bool,
        *,
        is_drawn: bool,
    ) -> None:
        """Lets simulators step, or begin episodes, and draw what somebody looks at: an actor all states after a chunk,
        and last ones."""
        draws = is_drawn or self.keep_images is True or callable(self.keep_images) or places.t == env.horizon
        options = {"is_idle": places.is_idle, "is_drawn": np.broadcast_to(draws, env.num_envs)}
        with self.clock("env"):
            next_seeds = places.reserve(self.seeds)
            env.send(executed, reset_seeds, reproducible=rebuilds, next_seeds=next_seeds, **options)


def _observed(state: EnvStep) -> Observation:
    """Returns the observation that actors are shown: states of dead environments, which mean nothing, are zeros."""
    if state.alive.all():
        return state.observation
    xp = state.observation.state.__array_namespace__()
    return state.observation._replace(state=xp.where(state.alive[:, None], state.observation.state, xp.float32(0.0)))


def get_episode(rollout: Rollout, e: int) -> Trajectory:
    """Returns episode `e` of a rollout as views, with its images where they were kept."""
    episode = jax.tree.map(lambda x: x[e], rollout.trajectory)
    if e not in (rollout.images or {}):
        return episode
    return episode._replace(observation=episode.observation._replace(images=rollout.images[e]))
