"""Demonstrations and pairs from the simulators of a configuration: found on disk, or collected now.

Simulators start, and a policy is loaded, when something is missing, and not before.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from stare_jax.data.demos import DemosConfig, collect_demos, collected_demos
from stare_jax.data.pairs import Pair, PairsConfig
from stare_jax.data.reader import Dataset
from stare_jax.data.rollouts import Actor, collect_pairs, collected_pairs
from stare_jax.envs import EnvConfig, Expert, VecEnv, execution_noise
from stare_jax.stages import TaskSpec


def find_or_collect_demos(
    directory: str | os.PathLike,
    env: EnvConfig,
    expert: Expert,
    config: DemosConfig,
    *,
    simulator: Callable[[], VecEnv],
    settings: Mapping[str, Any] | None = None,
    skip_broken: bool = False,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> tuple[Dataset, bool]:
    """Returns demonstrations, and whether some had to be collected now.

    Args:
        directory: of the data set.
        env: of the simulators.
        expert: of the task.
        config: how many.
        simulator: starts the simulators of `env`.
        settings: what the data depend on besides `EnvConfig.data_settings`.
        skip_broken: as for `collect_demos`, as are `should_stop`, `clock` and what is raised.
    """
    settings = env.data_settings | dict(settings or {})
    found = collected_demos(
        directory,
        expert,
        config,
        env_id=env.env_id,
        horizon=env.horizon,
        control_mode=env.resolved_control_mode,
        settings=settings,
        skip_broken=skip_broken,
    )
    if found is not None:
        return found, False
    collected = collect_demos(
        simulator(),
        expert,
        config,
        directory,
        noise_fn=execution_noise,
        control_mode=env.resolved_control_mode,
        settings=settings,
        skip_broken=skip_broken,
        should_stop=should_stop,
        clock=clock,
    )
    return collected, True


def find_or_collect_pairs(
    directory: str | os.PathLike,
    env: EnvConfig,
    actor: Actor,
    spec: TaskSpec,
    config: PairsConfig,
    *,
    simulator: Callable[[], VecEnv],
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[str], contextlib.AbstractContextManager] | None = None,
) -> tuple[Dataset, list[Pair], bool]:
    """Returns rollouts, their pairs, and whether rollouts had to be made now.

    Args:
        directory: of the data set.
        env: of the simulators.
        actor: whose rollouts.
        spec: the task.
        config: how many.
        simulator: starts the simulators of `env`.
        should_stop: as for `collect_pairs`, as are `clock` and what is raised.
    """
    found = collected_pairs(
        directory,
        actor,
        spec,
        config,
        env_id=env.env_id,
        horizon=env.horizon,
        num_envs=env.num_envs,
        control_mode=env.resolved_control_mode,
        settings=env.data_settings,
    )
    if found is not None:
        return *found, False
    collected = collect_pairs(
        simulator(),
        actor,
        spec,
        config,
        directory,
        control_mode=env.resolved_control_mode,
        settings=env.data_settings,
        should_stop=should_stop,
        clock=clock,
    )
    return *collected, True
