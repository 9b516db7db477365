"""Rollouts from shared initial states, of a policy or a disturbed expert, until they make enough preference pairs."""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.data.demos import EXPERT_SOURCE, expert_act, writing_rounds
from stare_jax.data.pairs import (
    SAME_START_KINDS,
    Outcome,
    Pair,
    PairsConfig,
    dataset_outcomes,
    make_task_pairs,
    measure_outcomes,
    write_pairs,
)
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import MANIFEST_FILE, read_manifest
from stare_jax.data.writer import DatasetWriter, Kind, require_same_kind
from stare_jax.envs.base import SimulatorInfo, VecEnv
from stare_jax.envs.experts.base import Expert, execution_noise
from stare_jax.envs.seeds import PAIR_SEEDS, first_seed, phase_key, take_seeds
from stare_jax.logging import Clock, Interrupted, progress
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import Rollout, collect_episodes
from stare_jax.rollout.decisions import Act
from stare_jax.rollout.prepared import prepare_params
from stare_jax.rollout.rounds import collect_round
from stare_jax.sharding import pod
from stare_jax.stages import TaskSpecs, as_specs, take_turns
from stare_jax.types import PyTree


class Actor(NamedTuple):
    """The actor of a collection of rollouts, which are numbered from 0."""

    act: Callable[[Sequence[int]], Act]
    """(numbers of the next rollouts, ascending) -> their actor. The same rollouts get the same actor, so that a
    collection goes on after an interruption as if there had been none."""
    noise_scale: Callable[[int], float]
    """Number of a rollout -> standard deviation of the noise in its actions, as a fraction of their range."""
    source: str
    """Name of the expert or of the checkpoint; rollouts of two sources are not mixed."""
    settings: Mapping[str, Any]
    """Settings of the actor, for the manifest."""
    depends_on_batch: bool
    """True if actions in a rollout depend on the other rollouts under way."""


def policy_actor(restore: Callable[[], tuple[Policy, PyTree]], config: PairsConfig, *, source: str) -> Actor:
    """Returns an actor that samples from a policy at `config.temperature`.

    Args:
        restore: () -> policy and parameters; called before the first action, and never if all rollouts are there
            already.
        config: temperature and seed.
        source: name of the policy's checkpoint, for the manifest.
    """
    key = phase_key(config.seed, "pairs")

    @functools.cache
    def restored() -> tuple[Policy, PyTree]:
        policy, params = restore()
        return policy, prepare_params(policy, params)

    def act(rollouts: Sequence[int]) -> Act:
        policy, params = restored()
        return policy_act(policy, params, jax.random.fold_in(key, rollouts[0]), temperature=config.temperature)

    # A policy draws its random numbers for all environments at once.
    return Actor(act, lambda rollout: 0.0, source, {"temperature": config.temperature}, depends_on_batch=True)


def expert_actor(expert: Expert, config: PairsConfig, *, noise_scale: float) -> Actor:
    """Returns an actor that executes an expert's actions with noise, and stores them with the noise.

    Of the rollouts from one initial state the first is undisturbed, the last has noise of the scale given, and the
    others lie evenly between, because no single scale suits all tasks: 0.33 made StackCube's expert fail in 10
    episodes of 10, and PullCube's in none.

    Args:
        expert: the task's expert.
        config: the number of rollouts from each initial state.
        noise_scale: standard deviation of the largest noise, as a fraction of the action's range.

    Raises:
        ValueError: there is no noise, and all rollouts would be alike.
    """
    if not 0 < noise_scale < math.inf:
        raise ValueError(f"noise_scale: got {noise_scale}, expected more than 0, or rollouts are alike")
    first = first_seed(PAIR_SEEDS, config.seed)

    def scale_of(rollout: int) -> float:
        return noise_scale * (rollout % config.rollouts_per_seed) / (config.rollouts_per_seed - 1)

    def act(rollouts: Sequence[int]) -> Act:
        perturb = execution_noise([first + i for i in rollouts], [scale_of(i) for i in rollouts], expert.action_scale)
        act_undisturbed = expert_act(expert)

        def disturbed(observation, signals, instructions, is_first):
            decision, observation = act_undisturbed(observation, signals, instructions, is_first)
            return decision._replace(action=perturb(decision.action, is_first)), observation

        return disturbed

    return Actor(act, scale_of, EXPERT_SOURCE, {"noise_scale": noise_scale}, depends_on_batch=False)


def collect_pairs(
    simulator: Callable[[], VecEnv],
    info: SimulatorInfo,
    actor: Actor,
    spec: TaskSpecs,
    config: PairsConfig,
    directory: str | os.PathLike,
    *,
    should_stop: Callable[[], bool] | None = None,
    clock: Clock | None = None,
) -> tuple[Dataset, list[Pair]]:
    """Collects rollouts into a data set until they make enough pairs, and writes the pairs beside them.

    Rollouts end when there are enough pairs that start alike, or at `config.max_rollouts`; the others are pairs of
    different starts. Several tasks take turns, one initial state each, until all have enough. Interrupted rollouts
    continue where they stopped. A data set that is complete is returned as it is, without a simulator. Processes share
    the rollouts of a round; process 0 writes.

    Args:
        simulator: starts the simulators; called only if rollouts are missing.
        info: properties of these simulators.
        actor: the actor; see `policy_actor` and `expert_actor`.
        spec: the task, whose stages decide between failures; of several tasks all, in the order of the simulators'.
        config: number and kind of the pairs.
        directory: folder of the data set of rollouts.
        should_stop: polled; when it answers True, the round in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the rollouts make no pair, or the folder holds something else or a damaged shard.
    """
    kind = _kind(actor, config, info)
    outcomes: list[Outcome] = []
    if pod.on_main((Path(directory) / MANIFEST_FILE).exists):
        manifest = read_manifest(directory)
        require_same_kind(directory, manifest, kind)
        dataset = Dataset(directory)
        outcomes = dataset_outcomes(dataset, spec) if dataset.num_episodes else []
        if outcomes and not _next_rollouts(config, spec, outcomes, manifest.progress):
            return dataset, pod.on_main(_write_pairs, directory, outcomes, config)
    with writing_rounds(directory, kind) as writer:
        _fill(writer, outcomes, simulator(), actor, spec, config, should_stop=should_stop, clock=clock or Clock())
    pairs = pod.on_main(_write_pairs, directory, outcomes, config)
    return Dataset(directory), pairs


def _fill(
    writer: DatasetWriter | None,
    outcomes: list[Outcome],
    env: VecEnv,
    actor: Actor,
    spec: TaskSpecs,
    config: PairsConfig,
    *,
    should_stop: Callable[[], bool] | None,
    clock: Clock,
) -> None:
    """Collects and stores round after round until there are enough pairs; adds their outcomes to `outcomes`."""
    num_done = pod.on_main(lambda: writer.manifest.progress.get("num_attempts", 0))
    num_tasks = len(as_specs(spec))
    actor.act(range(1))  # In all processes: weights may be spread over them, and one may have no rollout of its own.

    def num_made() -> str:
        return f"{sum(_num_same_start(outcomes, config).values())}/{config.num_pairs * num_tasks}"

    with progress(config.max_rollouts * num_tasks, "rollouts for pairs", "rollout", initial=num_done) as bar:
        while rollouts := pod.on_main(lambda: _next_rollouts(config, spec, outcomes, writer.manifest.progress)):
            bar.update(0, pairs=num_made())

            def run(chosen, tell, rollouts=rollouts):
                numbers = [rollouts[e] for e in chosen]
                return collect_episodes(
                    env,
                    actor.act(numbers),
                    _simulator_seeds(config, numbers),
                    stop_at_success=config.stop_at_success,
                    tasks=take_turns(spec, [number // config.rollouts_per_seed for number in numbers]),
                    reproducible=config.reproducible,
                    on_episode=tell,
                    should_stop=should_stop,
                    clock=clock,
                )

            rollout = collect_round(
                run, len(rollouts), as_a_whole=actor.depends_on_batch, on_episode=lambda _: bar.update(1)
            )
            if not rollout.is_complete:
                num_safe, folder = pod.on_main(lambda: (len(outcomes), writer.directory))
                raise Interrupted(f"preference pairs: {num_safe} rollouts are safe in {folder}")
            if writer is not None:
                with clock("data"):
                    outcomes.extend(_append(writer, rollout, actor, spec, _simulator_seeds(config, rollouts), rollouts))
        bar.update(0, pairs=num_made())


def _simulator_seeds(config: PairsConfig, rollouts: Sequence[int]) -> list[int]:
    starts = [i // config.rollouts_per_seed for i in rollouts]
    first = take_seeds(PAIR_SEEDS, config.seed, 0, max(starts) + 1)
    return [first[i] for i in starts]


def _kind(actor: Actor, config: PairsConfig, info: SimulatorInfo) -> Kind:
    """Returns the fields of the manifest that all rollouts of a data set have in common."""
    common = {"source": actor.source, "seed": config.seed, "reproducible": config.reproducible}
    common["rollouts_per_seed"] = config.rollouts_per_seed
    if not config.stop_at_success:  # not named by data sets that were begun before there was a choice
        common["stop_at_success"] = False
    if actor.depends_on_batch and config.reproducible:
        common |= {"num_envs": info.num_envs, "write_every": config.write_every}
    settings = common | dict(actor.settings) | {"horizon": info.horizon} | dict(info.settings)
    return Kind(info.env_id, info.control_mode, settings, {})


def _next_rollouts(config: PairsConfig, spec: TaskSpecs, outcomes: Sequence[Outcome], done: Mapping[str, Any]) -> range:
    """Returns the rollouts of the next round; none if there are enough pairs, or no more rollouts are allowed."""
    num_tasks, num_pairs = len(as_specs(spec)), _num_same_start(outcomes, config)
    if all(num_pairs[task] >= config.num_pairs for task in range(num_tasks)):
        return range(0)
    start, size = done.get("num_attempts", 0), config.write_every * config.rollouts_per_seed * num_tasks
    return range(start, min(start + size, config.max_rollouts * num_tasks))


def _append(
    writer: DatasetWriter,
    rollout: Rollout,
    actor: Actor,
    spec: TaskSpecs,
    seeds: Sequence[int],
    numbers: Sequence[int],
) -> list[Outcome]:
    """Stores the episodes that were not lost with a simulator, and returns their outcomes."""
    trajectory, instructions = rollout.trajectory, rollout.instructions
    outcomes = measure_outcomes(spec, trajectory.signals, trajectory.valid, instructions, seeds, rollout.task)
    kept = np.flatnonzero(trajectory.valid[:, 0])
    for e in kept:
        writer.append(
            jax.tree.map(lambda leaf, e=e: leaf[e], trajectory),
            instruction=instructions[e],
            seed=seeds[e],
            source=actor.source,
            noise_scale=actor.noise_scale(numbers[e]),
            attempt=numbers[e],
            task=rollout.task[e],
        )
    added = {"num_attempts": len(seeds), "num_steps": rollout.num_steps, "num_dropped": rollout.num_dropped}
    before = writer.manifest.progress
    writer.flush(progress={name: before.get(name, 0) + value for name, value in added.items()})
    return [outcomes[e] for e in kept]


def _num_same_start(outcomes: Sequence[Outcome], config: PairsConfig) -> Counter[int]:
    """Returns task -> number of its pairs that start alike."""
    pairs = make_task_pairs(outcomes, config, kinds=SAME_START_KINDS)
    return Counter(outcomes[pair.chosen].task for pair in pairs)


def _write_pairs(directory: str | os.PathLike, outcomes: Sequence[Outcome], config: PairsConfig) -> list[Pair]:
    pairs = make_task_pairs(outcomes, config)
    write_pairs(directory, pairs, outcomes)
    return pairs
