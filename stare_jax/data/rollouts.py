"""Rollouts from shared initial states, of a policy or a disturbed expert, until they make enough preference pairs."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax.data.demos import Expert, NoiseFn, expert_act
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
from stare_jax.models.policy import Policy
from stare_jax.rollout.collect import Act, Rollout, collect_episodes, policy_act
from stare_jax.stages import TaskSpec
from stare_jax.types import PyTree

Actor = Callable[[range], Act]
"""(which rollouts of a collection come next, counted from 0) -> who acts in them. The same rollouts get the same actor,
so that a collection goes on after an interruption as if there had been none."""


def policy_actor(policy: Policy, params: PyTree, config: PairsConfig) -> Actor:
    """Returns an actor that samples from a policy at `config.temperature`.

    What it samples depends on the number of environments, too, since a policy decides for all of them at once.
    """
    key = jax.random.key(config.seed)

    def actor(rollouts: range) -> Act:
        return policy_act(policy, params, jax.random.fold_in(key, rollouts.start), temperature=config.temperature)

    return actor


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

    def actor(rollouts: range) -> Act:
        scales = [noise_scale * (i % config.rollouts_per_seed) / (config.rollouts_per_seed - 1) for i in rollouts]
        perturb = noise_fn([first + i for i in rollouts], scales, expert.action_scale)
        act = expert_act(expert)

        def disturbed(observation, signals, instructions, is_first):
            decision, observation = act(observation, signals, instructions, is_first)
            return decision._replace(action=perturb(decision.action, is_first)), observation

        return disturbed

    return actor


def collect_pairs(
    env: VecEnv,
    actor: Actor,
    spec: TaskSpec,
    config: PairsConfig,
    directory: str | os.PathLike,
    *,
    source: str,
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
        source: who acts, e.g. the checkpoint; rollouts of another source are refused.
        control_mode: of the simulator, for the manifest.
        settings: what else the data depend on, such as `EnvConfig.data_settings`, for the manifest.
        should_stop: polled; where it answers True the chunk in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the rollouts make no pair, or the folder holds something else.
    """
    clock = clock or (lambda area: contextlib.nullcontext())
    common = {"source": source, "seed": config.seed, "reproducible": config.reproducible, "horizon": env.horizon}
    common |= {"rollouts_per_seed": config.rollouts_per_seed, **(settings or {})}
    first = first_seed(PAIR_SEEDS, config.seed)
    with (
        DatasetWriter(
            directory,
            env_id=env.env_id,
            control_mode=control_mode,
            settings=common,
            episodes_per_shard=None,
        ) as writer,
        progress(config.num_pairs, "preference pairs", "pair") as bar,
    ):
        outcomes = dataset_outcomes(Dataset(directory), spec) if writer.manifest.episodes else []
        num_pairs = _num_same_start(outcomes, config)
        bar.update(num_pairs, rollouts=len(outcomes))
        while num_pairs < config.num_pairs and (rollouts := _next_rollouts(config, writer.manifest.progress)):
            seeds = [first + i // config.rollouts_per_seed for i in rollouts]
            rollout = collect_episodes(
                env,
                actor(rollouts),
                seeds,
                stop_at_success=True,
                reproducible=config.reproducible,
                should_stop=should_stop,
                clock=clock,
            )
            if not rollout.is_complete:
                raise Interrupted(f"preference pairs: {len(outcomes)} rollouts are safe in {directory}")
            with clock("data"):
                outcomes += _append(writer, rollout, seeds, spec, source=source)
            num_before, num_pairs = num_pairs, _num_same_start(outcomes, config)
            bar.update(num_pairs - num_before, rollouts=len(outcomes))
    pairs = make_pairs(outcomes, num_pairs=config.num_pairs, max_reuse=config.max_reuse)
    write_pairs(directory, pairs, outcomes)
    return Dataset(directory), pairs


def _next_rollouts(config: PairsConfig, done: dict[str, Any]) -> range:
    start = done.get("num_attempts", 0)
    return range(start, min(start + config.chunk_seeds * config.rollouts_per_seed, config.max_rollouts))


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
