"""The one collector: environments in lock-step, or groups of them that take turns; one list of seeds, whose order is
that of the episodes."""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from stare_jax.envs.base import EnvStep, SimulatorError, VecEnv
from stare_jax.logging import Clock, announce_compiling
from stare_jax.models.policy import Decision, Policy, with_prompt
from stare_jax.rollout.decisions import Act, Chunk
from stare_jax.rollout.finite import check_actions, check_states
from stare_jax.rollout.kept import KEPT_ROW, ContextStore, jit_sample_and_keep
from stare_jax.rollout.places import Budget, Places, Waiting
from stare_jax.rollout.prepared import prepare_params
from stare_jax.rollout.records import KeepImages, Moment, Records
from stare_jax.sharding import pod
from stare_jax.sharding.mesh import BATCH_AXES, batch_sharding
from stare_jax.types import Observation, PyTree, Trajectory

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
    of one work, `act` decides for another. Which episode begins where follows from the episodes alone, so that equal
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
    seeds = [int(seed) for seed in seeds]
    clock = clock or Clock()
    task_of_episode = np.zeros(len(seeds), np.int32) if tasks is None else np.asarray(tasks, np.int32)
    tasks_of_envs = [0] if tasks is None else np.asarray(env.task_index).tolist()
    if missing := set(task_of_episode.tolist()) - set(tasks_of_envs):
        raise ValueError(f"tasks: got {sorted(missing)}, expected tasks of environments: {tasks_of_envs}")
    waiting, budget, under_way = Waiting(task_of_episode), Budget(max_steps), []
    records = Records(len(seeds), env.horizon, grows=max_steps is not None, keep_images=keep_images)
    num_dropped, is_stopped = 0, False

    def play_episodes(group: int, env: VecEnv, places: Places) -> Iterator[None]:
        """Runs episodes in one group of environments, and pauses while its simulators work."""
        nonlocal num_dropped, is_stopped
        chunk, num_dead, rebuilds = None, 0, True
        with clock("env"):
            first = [seeds[e if e >= 0 else i % len(seeds)] for i, e in enumerate(places.episode)]
            state = env.reset(first, reproducible=rebuilds)

        while True:
            # Simulators that start again are waited for, but not without end.
            num_dead = 0 if state.alive.any() else num_dead + 1
            if num_dead > MAX_DEAD_CALLS:
                raise SimulatorError(
                    f"{env.env_id}: none of {env.num_envs} environments came back alive in {num_dead} calls in a row; "
                    f"{len(seeds) - waiting.num_started} of {len(seeds)} episodes wait to begin"
                )

            # ---- Decide ---------------------------------------------------------------------------------------------
            # Instructions are those of now: `send` changes them.
            is_first, is_new, instructions = places.is_first, chunk is None or chunk.is_over, tuple(env.instructions)
            shown = _observed(state)
            decision, seen = None, shown
            with clock("policy"):
                if is_new:
                    decided, seen = act(shown, state.signals, instructions, is_first)
                    chunk = Chunk(decided)
                    decision = chunk.decision
                elif (places.t == env.horizon).any():  # for the value of last states
                    decision = jax.device_get(act(shown, state.signals, instructions, is_first)[0])
                action, recorded_action = chunk.next()

            # ---- Judge, hand out the next seeds ---------------------------------------------------------------------
            most = budget.left(group) / chunk.size if is_new else math.inf
            tick = places.judge(state, env.horizon, stop_at_success=stop_at_success, linger=linger, budget=most)
            budget.spend(group, int(tick.is_acting.sum()), chunk.size if is_new else None)
            is_open = chunk.is_over and budget.left(group) >= chunk.size
            reset_seeds = places.hand_out(tick, state.alive, seeds, is_open=is_open)
            is_over = places.are_empty and not (places.are_left and budget.left(group) >= chunk.size)

            # ---- Step; record and end episodes while simulators work ------------------------------------------------
            if not is_over:
                # The action for a simulator on a device has not left it.
                check_actions(recorded_action, state, tick, seeds)
                executed = action if isinstance(state.signals.success, jax.Array) else recorded_action
                executed = executed if perturb is None else perturb(recorded_action, is_first)
                xp = executed.__array_namespace__()
                sent = xp.where(tick.is_acting[:, None], executed, xp.float32(0.0)).astype(xp.float32)
                # The actor looks at all when a chunk is over, and at last states.
                is_drawn = chunk.is_over or keep_images is True or callable(keep_images) or places.t == env.horizon
                options = {"is_idle": places.is_idle, "is_drawn": np.broadcast_to(is_drawn, env.num_envs)}
                with clock("env"):
                    next_seeds = places.reserve(seeds)
                    env.send(sent, reset_seeds, reproducible=rebuilds, next_seeds=next_seeds, **options)
                rebuilds = reproducible  # Spare simulators have begun their first episodes, too.
            seen = seen if keep_images else seen._replace(images={})
            observation, signals = jax.device_get((seen, state.signals))
            check_states(observation.state, signals, tick, seeds)
            moment = Moment(instructions, observation, signals, recorded_action, decision, is_new, chunk.size)
            records.write(tick, moment)
            records.end_episodes(tick, on_episode)
            num_dropped += int(tick.is_lost.sum())
            is_stopped = is_stopped or not is_over and should_stop is not None and should_stop()
            if is_over or is_stopped:
                budget.release(group)
                return
            yield
            with clock("env"):
                state = env.receive()

    turns: deque[Iterator[None]] = deque()
    # Every environment takes its first episode before a spare simulator reserves any.
    for number, group in enumerate(env.groups if in_turns else [env]):
        task_of_env = np.zeros(group.num_envs, int) if tasks is None else np.asarray(group.task_index)
        if waiting.are_left(task_of_env):
            under_way.append(Places(number, task_of_env, waiting, group.spare_of_env if in_turns else None))
            turns.append(play_episodes(number, group, under_way[-1]))
    while turns and not is_stopped:
        loop = turns.popleft()
        if next(loop, "over") is None:
            turns.append(loop)

    unfinished = [e for places in under_way for e in places.episode.tolist() if e >= 0]
    trajectory, instructions = records.finish(waiting.num_rows, unfinished)
    images = records.images if callable(keep_images) else None
    task = task_of_episode[: len(instructions)]
    return Rollout(trajectory, instructions, task, records.num_steps, num_dropped, not is_stopped, images)


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


def policy_act(
    policy: Policy,
    params: PyTree,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    keep: ContextStore | None = None,
) -> Act:
    """Returns an `Act` that samples from a policy; equal keys act equally, new parameters compile nothing.

    Observations are put where the policy acts, in one place for all callers: their rows are split over the batch axes
    of the mesh, after repeating some where the mesh does not divide their number B. Decisions have B rows again. A
    simulator whose states are on a device finds the actions there. What sampling reads in another type or layout is
    in memory beside the parameters for as long as the actor is.

    Args:
        policy: its `sample` is compiled once per batch size, however many actors are made.
        params: on the devices where they are to be used; from `prepare_params`, or prepared here.
        key: consumed; tick n of the actor uses `fold_in(key, n)`, of several processes each of a key of its own.
        temperature: temperature of the action distribution; 0 is greedy.
        mesh: the devices that act; None takes those of `params`.
        keep: takes the contexts of all calls, on the devices of `mesh`, and decisions say in their trace which row each
            has (`KEPT_ROW`); None keeps none. For policies with `encode`.
    """
    params = prepare_params(policy, params)
    sample = _announced_sample(policy.sample) if keep is None else _announced_keeping(policy.sample, policy.encode)
    sharding = acting_sharding(params) if mesh is None else batch_sharding(mesh)
    ticks = itertools.count()
    key, temperature = pod.own_key(key), np.float32(temperature)

    def act(observation, signals, instructions, is_first):
        del signals, is_first
        seen = with_prompt(policy, observation, instructions)
        inputs = (params, place_rows(seen, sharding), key, np.uint32(next(ticks)), temperature)
        if keep is None:
            return _take_rows(sample(*inputs), len(instructions), observation), seen
        decision, row = keep.write(functools.partial(sample, *inputs), len(inputs[1].state))
        decision = _take_rows(decision, len(instructions), observation)
        return decision._replace(trace=decision.trace | {KEPT_ROW: row[: len(instructions)]}), seen

    return act


def acting_sharding(params: PyTree) -> Sharding | None:
    """Returns the sharding of a batch that meets parameters: split over the batch axes of their mesh, or on their only
    device; None for NumPy arrays, with which any device will do."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    return batch_sharding(named[0].mesh) if named else next(iter(shardings), None)


def place_rows(batch: PyTree, sharding: Sharding | None) -> PyTree:
    """Puts a batch on devices, wherever it is now; rows are repeated until the sharding divides their number.

    Args:
        batch: leaves `[B, ...]`, NumPy or JAX arrays on any device.
        sharding: the sharding that `acting_sharding` returns; None leaves the batch as it is.
    """
    if sharding is None:
        return batch
    num_rows = len(jax.tree.leaves(batch)[0])
    is_split = isinstance(sharding, NamedSharding)
    num_parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES) if is_split else 1
    if num_missing := -num_rows % num_parts:
        rows = np.arange(num_rows + num_missing) % num_rows
        batch = jax.tree.map(lambda x: x[rows], batch)
    return jax.device_put(batch, sharding)


def _take_rows(decision: Decision, num_rows: int, observation: Observation) -> Decision:
    """Returns the first rows of a decision, its action on the device that the observation is on, if it is on one."""
    if len(decision.logp) != num_rows:
        decision = jax.tree.map(lambda x: x[:num_rows], jax.device_get(decision))
    if isinstance(observation.state, jax.Array):
        decision = decision._replace(action=jax.device_put(decision.action, observation.state.sharding))
    return decision


@functools.lru_cache(maxsize=16)
def jit_sample(sample: Callable) -> Callable:
    """Compiles what an actor runs at every tick: (params, observation, key, tick, temperature) -> Decision."""

    @jax.jit
    def sample_at(params, observation, key, tick, temperature):
        return sample(params, observation, jax.random.fold_in(key, tick), temperature=temperature)

    return sample_at


@functools.lru_cache(maxsize=16)
def _announced_sample(sample: Callable) -> Callable:
    return announce_compiling("compiling the policy that acts", jit_sample(sample))


@functools.lru_cache(maxsize=16)
def _announced_keeping(sample: Callable, encode: Callable) -> Callable:
    return announce_compiling("compiling the policy that acts", jit_sample_and_keep(sample, encode))
