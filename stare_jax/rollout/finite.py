"""States and actions that are not finite end a collection, so that nothing is learnt from them or saved."""

import platform
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from stare_jax.envs.base import EnvStep
from stare_jax.envs.seeds import region_of
from stare_jax.rollout.places import Tick
from stare_jax.types import Array, Signals


def check_states(state: Array, signals: Signals, tick: Tick, seeds: Sequence[int]) -> None:
    """Makes sure that all that is measured in the states that are to be recorded is finite.

    Args:
        state: `[B, S]`, what policies observe, NumPy.
        signals: leaves `[B, ...]`, NumPy.
        tick: judgement of the episodes that the environments are in.
        seeds: of all episodes.

    Raises:
        FloatingPointError: names phase, array, seed, step, environment and host.
    """
    named = {f"signals.{name}": leaf for name, leaf in signals._asdict().items()}
    _check({"observation.state": state} | named, tick.is_live, tick, seeds)


def check_actions(action: np.ndarray, shown: EnvStep, tick: Tick, seeds: Sequence[int]) -> None:
    """Makes sure that the actions that are to be executed are finite; if not, a state may be the reason.

    Args:
        action: float32 `[B, A]`.
        shown: the states that they were chosen in.
        tick: judgement of the episodes that the environments are in.
        seeds: of all episodes.

    Raises:
        FloatingPointError: names phase, array, seed, step, environment and host.
    """
    if not np.isfinite(action[tick.is_acting]).all():
        check_states(*jax.device_get((shown.observation.state, shown.signals)), tick, seeds)
        _check({"action": action}, tick.is_acting, tick, seeds)


def _check(values: Mapping[str, np.ndarray], rows: np.ndarray, tick: Tick, seeds: Sequence[int]) -> None:
    for name, value in values.items():
        is_finite = np.isfinite(value[rows])
        if not is_finite.all():
            i = np.flatnonzero(rows)[np.argmin(is_finite.reshape(len(is_finite), -1).all(axis=1))]
            seed = seeds[tick.episode[i]]
            where = f"seed {seed} after {tick.t[i]} actions (environment {i}, host {platform.node()})"
            raise FloatingPointError(
                f"{region_of(seed)}: {name} of {where}: got {value[i].tolist()}, expected finite numbers"
            )
