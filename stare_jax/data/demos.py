"""Demonstrations: successful episodes of an expert, some of them disturbed, so that a policy sees recoveries as well.

The noise is added to the executed action; the stored action, which is imitated, is the expert's without noise (C.2).

Equal configs collect the same seeds in the same rounds, with the same noise, interrupted or not, in however many
environments, also if some of these die; with `reproducible` their episodes are the same bit for bit.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Interval, MinLen

from stare_jax.config import Count, Finite, Natural, NonNegative, Positive, Seed, check_fields
from stare_jax.data.norm_stats import clear_statistics, renew_statistics
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import MANIFEST_FILE, DatasetError, Manifest, read_manifest
from stare_jax.data.writer import DatasetWriter, Kind, require_same_kind
from stare_jax.envs.base import SimulatorInfo, VecEnv
from stare_jax.envs.experts.base import Expert, execution_noise, hesitation
from stare_jax.envs.seeds import DEMO_SEEDS, first_seed, take_seeds
from stare_jax.logging import Clock, Interrupted, progress
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import Rollout, collect_episodes
from stare_jax.rollout.decisions import Act
from stare_jax.rollout.rounds import collect_round
from stare_jax.sharding import pod
from stare_jax.types import Signals

EXPERT_SOURCE = "expert"
"""Name of the actor in a manifest, where it is an expert."""


@dataclasses.dataclass(frozen=True)
class DemosConfig:
    """Number of demonstrations, and the way they are made."""

    num_demos: Count = 100
    """Number of successful episodes to collect, of each task where there are several."""
    noise_scales: Annotated[tuple[tuple[NonNegative, Positive], ...], MinLen(1)] = ((0.0, 1.0),)
    """Pairs of (standard deviation of the noise as a fraction of the action's range, share of the demonstrations with
    this noise); shares need not sum to 1."""
    hesitation: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the expert's actions, drawn at random, at which the arm pauses instead, as the arms of people who
    teleoperate do. Pauses are imitated; hence only with a negative `idle_translation`, which keeps idle actions."""
    seed: Seed = 0
    """Seed of the run, from which the simulator seeds (`envs.seeds`) and the noise follow."""
    idle_translation: Finite = 0.01
    """Largest norm of an idle action's translation, as a fraction of the largest command; negative keeps idle ones.
    Actions of fewer than four numbers, as some toys have, are all kept."""
    idle_rotation: Finite = 0.06
    """Largest norm of an idle action's rotation, as a fraction of the largest command."""
    reproducible: bool = False
    """True takes slower resets, after which a data set can be collected again bit for bit, in any number of
    environments."""
    linger: Natural = 0
    """Number of further actions of the expert that are kept after the first success, so that a policy learns to let go
    and to stay; the horizon may cut them."""
    write_every: Count = 32
    """Number of episodes of a round, which are collected between two writes; an interruption loses no more."""
    max_attempts: Count = 10
    """Number of episodes tried per demonstration wanted before the collection fails."""

    def __post_init__(self):
        check_fields(self)
        scales = [scale for scale, _ in self.noise_scales]
        if len(set(scales)) < len(scales):
            raise ValueError(f"noise_scales: got scales {scales}, expected each once")
        if self.hesitation and self.idle_translation >= 0:
            got = f"{self.hesitation} with idle_translation = {self.idle_translation}"
            raise ValueError(f"hesitation: got {got}, expected idle_translation < 0: pauses are idle, to be imitated")


def demo_quotas(config: DemosConfig) -> dict[float, int]:
    """Returns noise scale -> number of demonstrations: the shares of `num_demos`, by largest remainder."""
    shares = np.array([share for _, share in config.noise_scales])
    exact = config.num_demos * shares / shares.sum()
    quotas = np.floor(exact).astype(int)
    largest_first = np.argsort(quotas - exact, kind="stable")
    quotas[largest_first[: config.num_demos - quotas.sum()]] += 1
    return {scale: int(quota) for (scale, _), quota in zip(config.noise_scales, quotas, strict=True)}


def expert_act(expert: Expert) -> Act:
    """Returns an `Act` of an expert, with one memory an environment; its decisions are actions alone."""
    return experts_act(lambda row: expert)


def experts_act(expert_of: Callable[[int], Expert]) -> Act:
    """Returns the same of several experts; `expert_of(row)` is the one that acts in an environment."""
    memories: list[Any] = []

    def act(observation, signals, instructions, is_first):
        del instructions
        signals = jax.device_get(signals)
        memories.extend([None] * (len(is_first) - len(memories)))
        actions = []
        for i, is_new in enumerate(is_first):
            expert = expert_of(i)
            memory = expert.init() if is_new or memories[i] is None else memories[i]
            action, memories[i] = expert.act(Signals(*(leaf[i] for leaf in signals)), memory)
            actions.append(action)
        return Decision(np.stack(actions).astype(np.float32)), observation

    return act


def _hesitating(act: Act, hesitate: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Act:
    """Returns an `Act` whose actions have gone through `hesitate(action, is_first)`."""

    def acting(observation, signals, instructions, is_first):
        decision, seen = act(observation, signals, instructions, is_first)
        return decision._replace(action=hesitate(decision.action, is_first)), seen

    return acting


def collect_demos(
    simulator: Callable[[], VecEnv],
    info: SimulatorInfo,
    expert: Expert | list[Expert],
    config: DemosConfig,
    directory: str | os.PathLike,
    *,
    action_mask: Sequence[bool] | None = None,
    skip_broken: bool = False,
    should_stop: Callable[[], bool] | None = None,
    clock: Clock | None = None,
) -> Dataset:
    """Collects demonstrations into a data set, or continues one that was interrupted, and writes its statistics.

    Processes share the episodes of a round; process 0 writes.

    A data set that is complete is returned as it is, without a simulator; with a larger `num_demos` it grows.

    Args:
        simulator: starts the simulators; called only if a demonstration is missing.
        info: properties of these simulators.
        expert: the task's expert; see `envs.tasks.make_expert`. Of several tasks a list, in the order of the
            simulators' tasks; they are collected one after the other.
        config: number and kind of the demonstrations.
        directory: folder of the data set.
        action_mask: bool `[A]`, the dimensions to normalise; all but the last, the gripper, if None.
        skip_broken: leave out damaged shards instead of raising before anything is collected. The episodes they held
            are not collected again.
        should_stop: polled; when it answers True, the round in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the expert fails too often, or the folder holds something else or a damaged shard.
    """
    experts = expert if isinstance(expert, list) else [expert]
    kind = _kind(experts[0], config, info)
    if pod.on_main((Path(directory) / MANIFEST_FILE).exists):
        manifest = read_manifest(directory)
        require_same_kind(directory, manifest, kind)
        dataset = Dataset(directory, skip_broken=skip_broken)  # Damage is found before hours of collecting, not after.
        if not _missing(config, manifest, len(experts)):
            pod.on_main(renew_statistics, dataset, action_mask=action_mask)
            return dataset
    with writing_rounds(directory, kind) as writer:
        _fill(writer, simulator(), experts, config, should_stop=should_stop, clock=clock or Clock())
    pod.from_main(None)  # The others read only what is whole.
    dataset = Dataset(directory, skip_broken=skip_broken)
    pod.on_main(renew_statistics, dataset, action_mask=action_mask)
    return dataset


@contextlib.contextmanager
def writing_rounds(directory: str | os.PathLike, kind: Kind) -> Iterator[DatasetWriter | None]:
    """Opens a data set in process 0, to be written round after round; the others get None."""
    if not pod.is_main():
        yield None
        return
    with DatasetWriter(
        directory,
        env_id=kind.env_id,
        control_mode=kind.control_mode,
        settings=kind.settings,
        filters=kind.filters,
        episodes_per_shard=None,
    ) as writer:
        yield writer


def _fill(
    writer: DatasetWriter | None,
    env: VecEnv,
    experts: Sequence[Expert],
    config: DemosConfig,
    *,
    should_stop: Callable[[], bool] | None,
    clock: Clock,
) -> None:
    """Collects and stores round after round, until no demonstration is missing."""
    num_done, num_demos = pod.on_main(lambda: len(writer.manifest.episodes)), config.num_demos * len(experts)
    with progress(num_demos, "demonstrations", "episode", initial=num_done) as bar:
        while (wanted := pod.on_main(lambda: _next_round(config, writer.manifest, len(experts)))) is not None:
            task, scale, seeds = wanted
            if writer is not None:  # Statistics are those of a complete data set, or absent.
                clear_statistics(writer.directory, writer.manifest.env_id)

            def run(chosen, tell, task=task, scale=scale, seeds=seeds):
                chosen_seeds, scales, expert = [seeds[e] for e in chosen], [scale] * len(chosen), experts[task]
                hesitate = hesitation(chosen_seeds, config.hesitation, expert.action_scale)
                return collect_episodes(
                    env,
                    _hesitating(expert_act(expert), hesitate) if config.hesitation else expert_act(expert),
                    chosen_seeds,
                    stop_at_success=True,
                    tasks=[task] * len(chosen) if len(experts) > 1 else None,
                    linger=config.linger,
                    reproducible=config.reproducible,
                    perturb=execution_noise(chosen_seeds, scales, expert.action_scale) if scale else None,
                    on_episode=tell,
                    should_stop=should_stop,
                    clock=clock,
                )

            rollout = collect_round(
                run,
                len(seeds),
                as_a_whole=False,
                on_episode=lambda episode: bar.update(int(episode.signals.success.any())),
            )
            if not rollout.is_complete:
                num_done, folder = pod.on_main(lambda: (len(writer.manifest.episodes), writer.directory))
                raise Interrupted(f"demonstrations: {num_done} of {num_demos} are safe in {folder}")
            if writer is not None:
                with clock("data"):
                    _append_successes(writer, rollout, scale, seeds, first=first_seed(DEMO_SEEDS, config.seed))


def _kind(expert: Expert, config: DemosConfig, info: SimulatorInfo) -> Kind:
    """Returns the fields of the manifest that all of a data set has in common."""
    total = sum(share for _, share in config.noise_scales)
    common = {"source": EXPERT_SOURCE, "seed": config.seed, "reproducible": config.reproducible}
    common["noise_scales"] = [[scale, round(share / total, 9)] for scale, share in config.noise_scales]
    # Not named by data sets that were begun before there was a choice.
    common |= {name: value for name in ("hesitation", "linger") if (value := getattr(config, name))}
    translation = config.idle_translation * max(expert.action_scale[:3])
    rotation = config.idle_rotation * max(expert.action_scale[3:-1], default=0.0)
    idle = {"translation": round(translation, 9), "rotation": round(rotation, 9)}  # 0.021 and not 0.0209...98
    has_gripper = len(expert.action_scale) > 3
    filters = {"idle": idle} if config.idle_translation >= 0 and has_gripper else {}
    settings = common | {"horizon": info.horizon} | dict(info.settings)
    return Kind(info.env_id, info.control_mode, settings, filters)


def _missing(config: DemosConfig, manifest: Manifest, num_tasks: int) -> dict[tuple[int, float], int]:
    """Returns (task, noise scale) -> number of demonstrations still missing, for those that miss some."""
    num_done = Counter((episode.task, episode.noise_scale) for episode in manifest.episodes)
    quotas = {(task, scale): quota for task in range(num_tasks) for scale, quota in demo_quotas(config).items()}
    missing = {kind: quota - num_done[kind] for kind, quota in quotas.items()}
    return {kind: number for kind, number in missing.items() if number > 0}


def _next_round(config: DemosConfig, manifest: Manifest, num_tasks: int) -> tuple[int, float, list[int]] | None:
    """Returns the task, the noise scale and the seeds of the next episodes to try; None if there are enough."""
    missing = _missing(config, manifest, num_tasks)
    if not missing:
        return None
    num_attempts = manifest.progress.get("num_attempts", 0)
    if num_attempts >= config.max_attempts * config.num_demos * num_tasks:
        left = missing if num_tasks > 1 else {scale: number for (_, scale), number in missing.items()}
        by = "task and noise scale" if num_tasks > 1 else "noise scale"
        raise DatasetError(
            f"the expert succeeded in only {len(manifest.episodes)} of {num_attempts} episodes of {manifest.env_id}, "
            f"and {config.num_demos * num_tasks} were asked for (missing by {by}: {left})"
        )
    (task, scale), num_missing = next(iter(missing.items()))
    return task, scale, list(take_seeds(DEMO_SEEDS, config.seed, num_attempts, min(num_missing, config.write_every)))


def _append_successes(
    writer: DatasetWriter, rollout: Rollout, scale: float, seeds: Sequence[int], *, first: int
) -> None:
    for e, seed in enumerate(seeds):
        episode = jax.tree.map(lambda leaf, e=e: leaf[e], rollout.trajectory)
        if (episode.signals.success & episode.valid).any():
            writer.append(
                episode,
                instruction=rollout.instructions[e],
                seed=seed,
                source=EXPERT_SOURCE,
                noise_scale=scale,
                attempt=seed - first,
                task=rollout.task[e],
            )
    before: dict[str, Any] = writer.manifest.progress
    added = {"num_attempts": len(seeds), "num_steps": rollout.num_steps, "num_dropped": rollout.num_dropped}
    writer.flush(progress={name: before.get(name, 0) + value for name, value in added.items()})
