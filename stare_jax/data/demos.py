"""Demonstrations: successful episodes of an expert, some of them disturbed, so that a policy sees recoveries, too.

The noise is added to what is executed; what is stored, and imitated, is what the expert would have done (C.2).

Equal configs collect the same seeds in the same chunks, with the same noise, interrupted or not, in however many
environments, whether or not some of these die; with `reproducible` their episodes are the same bit for bit.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from stare_jax.data.chunks import collect_chunk
from stare_jax.data.norm_stats import NORM_STATS_FILE, renew_statistics
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import MANIFEST_FILE, DatasetError, Manifest, read_manifest
from stare_jax.data.writer import DatasetWriter, require_same_kind
from stare_jax.envs.base import VecEnv
from stare_jax.envs.seeds import DEMO_SEEDS, first_seed
from stare_jax.logging import Interrupted, progress
from stare_jax.models.policy import Decision
from stare_jax.rollout.collect import Act, Rollout, collect_episodes
from stare_jax.types import Signals, Trajectory

SOURCE = "expert"

NoiseFn = Callable[[Sequence[int], Sequence[float], Sequence[float]], Callable[[np.ndarray, np.ndarray], np.ndarray]]
"""`envs.experts.execution_noise`: (seeds, scales, action_scale [A]) -> `perturb` of `collect_episodes`."""


class Expert(Protocol):
    """What is asked of an expert; `envs.experts.Expert` is one."""

    init: Callable[[], Any]
    """() -> the memory of an episode that begins."""
    act: Callable[[Signals, Any], tuple[np.ndarray, Any]]
    """(signals of one state, memory) -> (action float32 `[A]`, memory)."""
    action_scale: Sequence[float]
    """`[A]`: the largest command of each dimension that is of use."""


@dataclasses.dataclass(frozen=True)
class DemosConfig:
    """How many demonstrations, and how they are made."""

    num_demos: int = 100
    """successful episodes to collect."""
    noise_scales: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """(standard deviation of the noise as a fraction of the action's range, share of the demonstrations that gets it);
    shares need not sum to 1."""
    seed: int = 0
    """of the run: picks the simulator seeds (`envs.seeds`) and the noise."""
    idle_translation: float = 0.01
    """largest norm of an idle action's translation, as a fraction of the largest command; negative keeps idle ones."""
    idle_rotation: float = 0.06
    """largest norm of an idle action's rotation, as a fraction of the largest command."""
    reproducible: bool = False
    """pay for resets after which a data set can be collected again bit for bit, however many environments do it."""
    chunk_episodes: int = 32
    """episodes collected between two writes, which is what an interruption loses."""
    max_attempts: int = 10
    """episodes tried per demonstration wanted, before giving up on the expert."""

    def __post_init__(self):
        for name in ("num_demos", "chunk_episodes", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        scales = [scale for scale, _ in self.noise_scales]
        if not scales or min(scales) < 0 or len(set(scales)) < len(scales):
            raise ValueError(f"noise_scales: got scales {scales}, expected at least one, each once, none negative")
        if min(share for _, share in self.noise_scales) <= 0:
            raise ValueError(f"noise_scales: got {self.noise_scales}, expected positive shares")
        first_seed(DEMO_SEEDS, self.seed)


def demo_quotas(config: DemosConfig) -> dict[float, int]:
    """Returns how many demonstrations each noise scale gets: the shares of `num_demos`, by largest remainder."""
    shares = np.array([share for _, share in config.noise_scales])
    exact = config.num_demos * shares / shares.sum()
    quotas = np.floor(exact).astype(int)
    largest_first = np.argsort(quotas - exact, kind="stable")
    quotas[largest_first[: config.num_demos - quotas.sum()]] += 1
    return {scale: int(quota) for (scale, _), quota in zip(config.noise_scales, quotas, strict=True)}


def expert_act(expert: Expert) -> Act:
    """Returns an expert as `collect_episodes` wants it: one memory an environment, actions alone."""
    memories: list[Any] = []

    def act(observation, signals, instructions, is_first):
        del instructions
        signals = jax.device_get(signals)
        memories.extend([None] * (len(is_first) - len(memories)))
        actions = []
        for i, is_new in enumerate(is_first):
            memory = expert.init() if is_new or memories[i] is None else memories[i]
            action, memories[i] = expert.act(Signals(*(leaf[i] for leaf in signals)), memory)
            actions.append(action)
        return Decision(np.stack(actions).astype(np.float32)), observation

    return act


def collected_demos(
    directory: str | os.PathLike,
    expert: Expert,
    config: DemosConfig,
    *,
    env_id: str,
    horizon: int,
    control_mode: str = "",
    settings: Mapping[str, Any] | None = None,
    action_mask: Sequence[bool] | None = None,
    skip_broken: bool = False,
) -> Dataset | None:
    """Returns what `collect_demos` would, where a folder holds it all, so that no simulator need be started.

    Args:
        directory: of the data set, which need not exist.
        env_id: of the simulator, as is the horizon; all else is as for `collect_demos`.

    Returns:
        None where something is still to be collected.

    Raises:
        DatasetError: the folder holds demonstrations of another kind.
        DamagedShardError: a shard on disk is missing or damaged.
    """
    if not (Path(directory) / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(directory)
    settings = {"horizon": horizon, **(settings or {})}
    require_same_kind(directory, manifest, _identity(expert, config, env_id, control_mode, settings))
    dataset = Dataset(directory, skip_broken=skip_broken)
    if _missing(config, manifest):
        return None
    renew_statistics(dataset, action_mask=action_mask)
    return dataset


def collect_demos(
    env: VecEnv,
    expert: Expert,
    config: DemosConfig,
    directory: str | os.PathLike,
    *,
    noise_fn: NoiseFn,
    control_mode: str = "",
    settings: Mapping[str, Any] | None = None,
    action_mask: Sequence[bool] | None = None,
    skip_broken: bool = False,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> Dataset:
    """Collects demonstrations into a data set, or continues one that was interrupted, and writes its statistics.

    A data set that is complete is returned as it is; with a larger `num_demos` it grows.

    Args:
        env: the simulator.
        expert: of the task; see `envs.experts.make_expert`.
        config: how many.
        directory: of the data set.
        noise_fn: disturbs what is executed; see `envs.experts.execution_noise`.
        control_mode: of the simulator, for the manifest.
        settings: what else the data depend on, such as `EnvConfig.data_settings`, for the manifest.
        action_mask: bool `[A]`, the dimensions to normalise; all but the last, the gripper, if None.
        skip_broken: leave out damaged shards instead of raising before anything is collected. What they held is not
            collected again.
        should_stop: polled; where it answers True the chunk in progress is dropped.
        clock: `clock("env")`, `clock("policy")` and `clock("data")` are held during the work of these.

    Raises:
        Interrupted: `should_stop` said so; calling again continues.
        DatasetError: the expert fails too often, or the folder holds something else or a damaged shard.
    """
    clock = clock or (lambda area: contextlib.nullcontext())
    identity = _identity(expert, config, env.env_id, control_mode, {"horizon": env.horizon, **(settings or {})})
    with DatasetWriter(directory, **identity, episodes_per_shard=None) as writer:
        Dataset(directory, skip_broken=skip_broken)  # Damage is found before hours of collecting, not after.
        _fill(writer, env, expert, config, noise_fn=noise_fn, should_stop=should_stop, clock=clock)
    dataset = Dataset(directory, skip_broken=skip_broken)
    renew_statistics(dataset, action_mask=action_mask)
    return dataset


def _fill(
    writer: DatasetWriter,
    env: VecEnv,
    expert: Expert,
    config: DemosConfig,
    *,
    noise_fn: NoiseFn,
    should_stop: Callable[[], bool] | None,
    clock: Callable[[str], contextlib.AbstractContextManager],
) -> None:
    """Collects and stores chunk after chunk, until no demonstration is missing."""
    num_done = len(writer.manifest.episodes)
    with progress(config.num_demos, "demonstrations", "episode", initial=num_done) as bar:
        while (chunk := _next_chunk(config, writer.manifest)) is not None:
            # Statistics are those of a complete data set, or absent.
            (writer.directory / NORM_STATS_FILE).unlink(missing_ok=True)
            rollout = _collect_chunk(
                env,
                expert,
                config,
                *chunk,
                noise_fn=noise_fn,
                on_episode=lambda episode: bar.update(int(episode.signals.success.any())),
                should_stop=should_stop,
                clock=clock,
            )
            if not rollout.is_complete:
                num_done = len(writer.manifest.episodes)
                raise Interrupted(f"demonstrations: {num_done} of {config.num_demos} are safe in {writer.directory}")
            with clock("data"):
                _append_successes(writer, rollout, *chunk, first=first_seed(DEMO_SEEDS, config.seed))


def _collect_chunk(
    env: VecEnv,
    expert: Expert,
    config: DemosConfig,
    scale: float,
    seeds: Sequence[int],
    *,
    noise_fn: NoiseFn,
    on_episode: Callable[[Trajectory], None],
    should_stop: Callable[[], bool] | None,
    clock: Callable[[str], contextlib.AbstractContextManager],
) -> Rollout:
    def run(chosen, tell):
        chosen_seeds = [seeds[e] for e in chosen]
        scales = [scale] * len(chosen)
        return collect_episodes(
            env,
            expert_act(expert),
            chosen_seeds,
            stop_at_success=True,
            reproducible=config.reproducible,
            perturb=noise_fn(chosen_seeds, scales, expert.action_scale) if scale else None,
            on_episode=tell,
            should_stop=should_stop,
            clock=clock,
        )

    return collect_chunk(run, len(seeds), as_a_whole=False, on_episode=on_episode)


def _identity(
    expert: Expert, config: DemosConfig, env_id: str, control_mode: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of the manifest that all of a data set has in common."""
    total = sum(share for _, share in config.noise_scales)
    common = {"source": SOURCE, "seed": config.seed, "reproducible": config.reproducible}
    common["noise_scales"] = [[scale, round(share / total, 9)] for scale, share in config.noise_scales]
    translation = config.idle_translation * max(expert.action_scale[:3])
    rotation = config.idle_rotation * max(expert.action_scale[3:-1], default=0.0)
    idle = {"translation": round(translation, 9), "rotation": round(rotation, 9)}  # 0.021 and not 0.0209...98
    filters = {"idle": idle} if config.idle_translation >= 0 else {}
    return {"env_id": env_id, "control_mode": control_mode, "settings": common | settings, "filters": filters}


def _missing(config: DemosConfig, manifest: Manifest) -> dict[float, int]:
    """Returns how many demonstrations are still wanted, by noise scale, where any are."""
    num_done = Counter(episode.noise_scale for episode in manifest.episodes)
    missing = {scale: quota - num_done[scale] for scale, quota in demo_quotas(config).items()}
    return {scale: number for scale, number in missing.items() if number > 0}


def _next_chunk(config: DemosConfig, manifest: Manifest) -> tuple[float, list[int]] | None:
    """Returns the noise scale and seeds of the next episodes to try; None if there are enough."""
    missing = _missing(config, manifest)
    if not missing:
        return None
    num_attempts = manifest.progress.get("num_attempts", 0)
    if num_attempts >= config.max_attempts * config.num_demos:
        raise DatasetError(
            f"the expert succeeded in only {len(manifest.episodes)} of {num_attempts} episodes of {manifest.env_id}, "
            f"and {config.num_demos} were asked for (missing by noise scale: {missing})"
        )
    scale, num_missing = next(iter(missing.items()))
    first = first_seed(DEMO_SEEDS, config.seed) + num_attempts
    return scale, list(range(first, first + min(num_missing, config.chunk_episodes)))


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
                source=SOURCE,
                noise_scale=scale,
                attempt=seed - first,
            )
    before: dict[str, Any] = writer.manifest.progress
    added = {"num_attempts": len(seeds), "num_steps": rollout.num_steps, "num_dropped": rollout.num_dropped}
    writer.flush(progress={name: before.get(name, 0) + value for name, value in added.items()})
