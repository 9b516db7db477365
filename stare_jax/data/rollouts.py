"""Rollouts of a policy from shared initial states, collected until they make enough preference pairs."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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
from stare_jax.data.writer import DatasetWriter
from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import PAIR_SEEDS, first_seed
from stare_jax.logging import Interrupted, progress
from stare_jax.rollout.collect import Act, Rollout, collect_episodes
from stare_jax.stages import TaskSpec


def collect_pairs(
    env: VecEnv,
    act: Act,
    spec: TaskSpec,
    config: PairsConfig,
    directory: str | os.PathLike,
    *,
    source: str,
    control_mode: str = "",
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> tuple[Dataset, list[Pair]]:
    """Collects rollouts into a data set until they make enough pairs, and writes the pairs beside them.

    Rollouts end when there are enough pairs that start alike, or at `config.max_rollouts`; what is missing then is
    filled up with pairs of different starts. Interrupted rollouts continue where they stopped.

    Args:
        env: the simulator.
        act: the policy, at `config.temperature`.
        spec: the task, whose stages decide between failures.
        config: how many.
        directory: of the data set of rollouts.
        source: who acts, e.g. the checkpoint; rollouts of another source are refused.
        control_mode: of the simulator, for the manifest.
        should_stop: polled; where it answers True the chunk in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the rollouts make no pair, or the folder holds something else.
    """
    settings = {"source": source, "seed": config.seed, "horizon": env.horizon, "temperature": config.temperature}
    clock = clock or (lambda area: contextlib.nullcontext())
    settings["rollouts_per_seed"] = config.rollouts_per_seed
    with (
        DatasetWriter(
            directory,
            env_id=env.env_id,
            control_mode=control_mode,
            settings=settings,
            episodes_per_shard=None,
        ) as writer,
        progress(config.num_pairs, "preference pairs", "pair") as bar,
    ):
        outcomes = dataset_outcomes(Dataset(directory), spec) if writer.manifest.episodes else []
        num_pairs = _num_same_start(outcomes, config)
        bar.update(num_pairs, rollouts=len(outcomes))
        while num_pairs < config.num_pairs and (seeds := _next_seeds(config, writer.manifest.progress)):
            rollout = collect_episodes(env, act, seeds, stop_at_success=True, should_stop=should_stop, clock=clock)
            if not rollout.is_complete:
                raise Interrupted(f"preference pairs: {len(outcomes)} rollouts are safe in {directory}")
            with clock("data"):
                outcomes += _append(writer, rollout, seeds, spec, source=source)
            num_before, num_pairs = num_pairs, _num_same_start(outcomes, config)
            bar.update(num_pairs - num_before, rollouts=len(outcomes))
    pairs = make_pairs(outcomes, num_pairs=config.num_pairs, max_reuse=config.max_reuse)
    write_pairs(directory, pairs, outcomes)
    return Dataset(directory), pairs


def _next_seeds(config: PairsConfig, done: dict[str, Any]) -> list[int]:
    start = done.get("num_attempts", 0)
    stop = min(start + config.chunk_seeds * config.rollouts_per_seed, config.max_rollouts)
    first = first_seed(PAIR_SEEDS, config.seed)
    return [first + i // config.rollouts_per_seed for i in range(start, stop)]


def _append(
    writer: DatasetWriter, rollout: Rollout, seeds: Sequence[int], spec: TaskSpec, *, source: str
) -> list[Outcome]:
    """Stores the episodes that were not lost with a simulator, and returns their outcomes."""
    trajectory, instructions = rollout.trajectory, rollout.instructions
    outcomes = measure_outcomes(spec, trajectory.signals, trajectory.valid, instructions, seeds)
    kept = np.flatnonzero(trajectory.valid[:, 0])
    for e in kept:
        episode = jax.tree.map(lambda leaf, e=e: leaf[e], trajectory)
        writer.append(episode, instruction=instructions[e], seed=seeds[e], source=source)
    added = {"num_attempts": len(seeds), "num_steps": rollout.num_steps, "num_dropped": rollout.num_dropped}
    before = writer.manifest.progress
    writer.flush(progress={name: before.get(name, 0) + value for name, value in added.items()})
    return [outcomes[e] for e in kept]


def _num_same_start(outcomes: Sequence[Outcome], config: PairsConfig) -> int:
    kinds = SAME_START_KINDS
    return len(make_pairs(outcomes, num_pairs=config.num_pairs, max_reuse=config.max_reuse, kinds=kinds))
