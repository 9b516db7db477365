"""Rollouts from shared initial states, of a policy or a disturbed expert, until they make enough preference pairs."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.data.chunks import collect_chunk
from stare_jax.data.demos import SOURCE, Expert, NoiseFn, expert_act
from stare_jax.data.pairs import (
    SAME_START_KINDS,
    Outcome,
    Pair,
    PairsConfig,
    dataset_outcomes,
    make_pairs,
    measure_outcomes,
    write_pairs,
)
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import MANIFEST_FILE, read_manifest
from stare_jax.data.writer import DatasetWriter, require_same_kind
from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import PAIR_SEEDS, first_seed
from stare_jax.logging import Interrupted, progress
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Act, Rollout, collect_episodes, policy_act
from stare_jax.stages import TaskSpec
from stare_jax.types import PyTree, Trajectory


class Actor(NamedTuple):
    """Who acts in the rollouts of a collection, which are counted from 0."""

    act: Callable[[Sequence[int]], Act]
    """(which rollouts come next, ascending) -> who acts in them. The same rollouts get the same actor, so that a
    collection goes on after an interruption as if there had been none."""
    noise_scale: Callable[[int], float]
    """rollout -> standard deviation of the noise in its actions, as a fraction of their range."""
    source: str
    """the expert, or which checkpoint; rollouts of two sources are not mixed."""
    settings: Mapping[str, Any]
    """what it is made from, for the manifest."""
    depends_on_batch: bool
    """whether what it does in a rollout depends on what else is under way."""


def policy_actor(restore: Callable[[], tuple[Policy, PyTree]], config: PairsConfig, *, source: str) -> Actor:
    """Returns an actor that samples from a policy at `config.temperature`.

    Args:
        restore: () -> policy and parameters; called when it is to act for the first time, and never if all rollouts
            are there already.
        config: temperature and seed.
        source: which policy that is, for the manifest.
    """
    key, restored = jax.random.key(config.seed), functools.cache(restore)

    def act(rollouts: Sequence[int]) -> Act:
        policy, params = restored()
        return policy_act(policy, params, jax.random.fold_in(key, rollouts[0]), temperature=config.temperature)

    # A policy draws its random numbers for all environments at once.
    return Actor(act, lambda rollout: 0.0, source, {"temperature": config.temperature}, depends_on_batch=True)


def expert_actor(expert: Expert, config: PairsConfig, noise_fn: NoiseFn, *, noise_scale: float) -> Actor:
    """Returns an actor that does what an expert would, disturbed, and stores what it does.

    Of the rollouts from one initial state the first is undisturbed, the last has noise of the scale given, and the
    others lie evenly between, because no one scale suits all tasks: 0.33 made StackCube's expert fail in 10 episodes of
    10, and PullCube's in none.

    Args:
        expert: of the task.
        config: how many rollouts there are from each initial state.
        noise_fn: makes the noise; see `envs.experts.execution_noise`.
        noise_scale: standard deviation of the largest noise, as a fraction of the action's range.

    Raises:
        ValueError: there is no noise, and all rollouts would be alike.
    """
    if noise_scale <= 0:
        raise ValueError(f"noise_scale: got {noise_scale}, expected more than 0, or rollouts are alike")
    first = first_seed(PAIR_SEEDS, config.seed)

    def scale_of(rollout: int) -> float:
        return noise_scale * (rollout % config.rollouts_per_seed) / (config.rollouts_per_seed - 1)

    def act(rollouts: Sequence[int]) -> Act:
        perturb = noise_fn([first + i for i in rollouts], [scale_of(i) for i in rollouts], expert.action_scale)
        act_undisturbed = expert_act(expert)

        def disturbed(observation, signals, instructions, is_first):
            decision, observation = act_undisturbed(observation, signals, instructions, is_first)
            return decision._replace(action=perturb(decision.action, is_first)), observation

        return disturbed

    return Actor(act, scale_of, SOURCE, {"noise_scale": noise_scale}, depends_on_batch=False)


def collected_pairs(
    directory: str | os.PathLike,
    actor: Actor,
    spec: TaskSpec,
    config: PairsConfig,
    *,
    env_id: str,
    horizon: int,
    num_envs: int,
    control_mode: str = "",
    settings: Mapping[str, Any] | None = None,
) -> tuple[Dataset, list[Pair]] | None:
    """Returns what `collect_pairs` would, where a folder holds it all, so that no simulator need be started.

    Args:
        directory: of the data set, which need not exist.
        env_id: of the simulator, as are horizon and num_envs; all else is as for `collect_pairs`.

    Returns:
        None where rollouts are still to be made.

    Raises:
        DatasetError: the folder holds rollouts of another kind, or they make no pair.
        DamagedShardError: a shard on disk is missing or damaged.
    """
    if not (Path(directory) / MANIFEST_FILE).exists():
        return None
    manifest, settings = read_manifest(directory), {"horizon": horizon, **(settings or {})}
    require_same_kind(directory, manifest, _identity(actor, config, env_id, num_envs, control_mode, settings))
    dataset = Dataset(directory)
    if not dataset.num_episodes:
        return None
    outcomes = dataset_outcomes(dataset, spec)
    if _next_rollouts(config, outcomes, manifest.progress):
        return None
    return dataset, _write_pairs(directory, outcomes, config)


def collect_pairs(
    env: VecEnv,
    actor: Actor,
    spec: TaskSpec,
    config: PairsConfig,
    directory: str | os.PathLike,
    *,
    control_mode: str = "",
    settings: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> tuple[Dataset, list[Pair]]:
    """Collects rollouts into a data set until they make enough pairs, and writes the pairs beside them.

    Rollouts end when there are enough pairs that start alike, or at `config.max_rollouts`; what is missing then is
    filled up with pairs of different starts. Interrupted rollouts continue where they stopped.

    Args:
        env: the simulator.
        actor: who acts; see `policy_actor` and `expert_actor`.
        spec: the task, whose stages decide between failures.
        config: how many.
        directory: of the data set of rollouts.
        control_mode: of the simulator, for the manifest.
        settings: what else the data depend on, such as `EnvConfig.data_settings`, for the manifest.
        should_stop: polled; where it answers True the chunk in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the rollouts make no pair, or the folder holds something else or a damaged shard.
    """
    clock, settings = clock or (lambda area: contextlib.nullcontext()), {"horizon": env.horizon, **(settings or {})}
    identity = _identity(actor, config, env.env_id, env.num_envs, control_mode, settings)
    with DatasetWriter(directory, **identity, episodes_per_shard=None) as writer:
        dataset = Dataset(directory)
        outcomes = dataset_outcomes(dataset, spec) if dataset.num_episodes else []
        _fill(writer, outcomes, env, actor, spec, config, should_stop=should_stop, clock=clock)
    return Dataset(directory), _write_pairs(directory, outcomes, config)


def _fill(
    writer: DatasetWriter,
    outcomes: list[Outcome],
    env: VecEnv,
    actor: Actor,
    spec: TaskSpec,
    config: PairsConfig,
    *,
    should_stop: Callable[[], bool] | None,
    clock: Callable[[str], contextlib.AbstractContextManager],
) -> None:
    """Collects and stores chunk after chunk until there are enough pairs; adds what they came to to `outcomes`."""
    num_done = writer.manifest.progress.get("num_attempts", 0)
    with progress(config.max_rollouts, "rollouts for pairs", "rollout", initial=num_done) as bar:
        while rollouts := _next_rollouts(config, outcomes, writer.manifest.progress):
            bar.update(0, pairs=f"{_num_same_start(outcomes, config)}/{config.num_pairs}")
            rollout = _collect_chunk(
                env, actor, config, rollouts, on_episode=lambda _: bar.update(1), should_stop=should_stop, clock=clock
            )
            if not rollout.is_complete:
                raise Interrupted(f"preference pairs: {len(outcomes)} rollouts are safe in {writer.directory}")
            with clock("data"):
                outcomes += _append(writer, rollout, actor, spec, _simulator_seeds(config, rollouts), rollouts)
        bar.update(0, pairs=f"{_num_same_start(outcomes, config)}/{config.num_pairs}")


def _collect_chunk(
    env: VecEnv,
    actor: Actor,
    config: PairsConfig,
    rollouts: Sequence[int],
    *,
    on_episode: Callable[[Trajectory], None],
    should_stop: Callable[[], bool] | None,
    clock: Callable[[str], contextlib.AbstractContextManager],
) -> Rollout:
    def run(chosen, tell):
        numbers = [rollouts[e] for e in chosen]
        return collect_episodes(
            env,
            actor.act(numbers),
            _simulator_seeds(config, numbers),
            stop_at_success=True,
            reproducible=config.reproducible,
            on_episode=tell,
            should_stop=should_stop,
            clock=clock,
        )

    return collect_chunk(run, len(rollouts), as_a_whole=actor.depends_on_batch, on_episode=on_episode)


def _simulator_seeds(config: PairsConfig, rollouts: Sequence[int]) -> list[int]:
    return [first_seed(PAIR_SEEDS, config.seed) + i // config.rollouts_per_seed for i in rollouts]


def _identity(
    actor: Actor,
    config: PairsConfig,
    env_id: str,
    num_envs: int,
    control_mode: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the fields of the manifest that all rollouts of a data set have in common."""
    common = {"source": actor.source, "seed": config.seed, "reproducible": config.reproducible}
    common["rollouts_per_seed"] = config.rollouts_per_seed
    if actor.depends_on_batch and config.reproducible:
        common |= {"num_envs": num_envs, "chunk_seeds": config.chunk_seeds}
    return {"env_id": env_id, "control_mode": control_mode, "settings": common | {**actor.settings} | {**settings}}


def _next_rollouts(config: PairsConfig, outcomes: Sequence[Outcome], done: Mapping[str, Any]) -> range:
    """Returns the rollouts of the next chunk; none if there are enough pairs, or no more rollouts are allowed."""
    if _num_same_start(outcomes, config) >= config.num_pairs:
        return range(0)
    start = done.get("num_attempts", 0)
    return range(start, min(start + config.chunk_seeds * config.rollouts_per_seed, config.max_rollouts))


def _append(
    writer: DatasetWriter,
    rollout: Rollout,
    actor: Actor,
    spec: TaskSpec,
    seeds: Sequence[int],
    numbers: Sequence[int],
) -> list[Outcome]:
    """Stores the episodes that were not lost with a simulator, and returns their outcomes."""
    trajectory, instructions = rollout.trajectory, rollout.instructions
    outcomes = measure_outcomes(spec, trajectory.signals, trajectory.valid, instructions, seeds)
    kept = np.flatnonzero(trajectory.valid[:, 0])
    for e in kept:
        writer.append(
            jax.tree.map(lambda leaf, e=e: leaf[e], trajectory),
            instruction=instructions[e],
            seed=seeds[e],
            source=actor.source,
            noise_scale=actor.noise_scale(numbers[e]),
            attempt=numbers[e],
        )
    added = {"num_attempts": len(seeds), "num_steps": rollout.num_steps, "num_dropped": rollout.num_dropped}
    before = writer.manifest.progress
    writer.flush(progress={name: before.get(name, 0) + value for name, value in added.items()})
    return [outcomes[e] for e in kept]


def _num_same_start(outcomes: Sequence[Outcome], config: PairsConfig) -> int:
    kinds = SAME_START_KINDS
    return len(make_pairs(outcomes, num_pairs=config.num_pairs, max_reuse=config.max_reuse, kinds=kinds))


def _write_pairs(directory: str | os.PathLike, outcomes: Sequence[Outcome], config: PairsConfig) -> list[Pair]:
    pairs = make_pairs(outcomes, num_pairs=config.num_pairs, max_reuse=config.max_reuse)
    write_pairs(directory, pairs, outcomes)
    return pairs
