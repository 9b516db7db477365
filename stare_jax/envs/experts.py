"""Closed-loop experts: pure functions of `Signals` and a small memory, in the policy's own action space.

They look at every state anew, so they recover from whatever was executed instead of what they decided: demonstrations
with execution noise keep clean labels.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs import panda_experts, widowx_experts
from stare_jax.types import Signals


class Expert(NamedTuple):
    """One environment's expert; loop over environments, or over the rows of a batch."""

    init: Callable[[], Any]
    """() -> the memory of an episode that begins."""
    act: Callable[[Signals, Any], tuple[np.ndarray, Any]]
    """(signals of one state, memory) -> (action float32 `[A]`, memory)."""
    noise_range: np.ndarray
    """float32 `[A]`: half the range of each action dimension that execution noise applies to, 0 elsewhere."""


def make_expert(env_id: str) -> Expert:
    """Returns the expert of a task, for the task's default control mode.

    Raises:
        ValueError: there is none for this task.
    """
    if env_id not in _EXPERTS:
        raise ValueError(f"env_id: got {env_id!r}, expected one of {sorted(_EXPERTS)}")
    return _EXPERTS[env_id]


def execution_noise(
    rng: np.random.Generator, scale: float, noise_range: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `perturb(action [B, A], is_first [B])`: the action with Gaussian noise, clipped to its range.

    Args:
        rng: drawn from at every call.
        scale: standard deviation as a fraction of `noise_range`; 0 leaves every action as it is.
        noise_range: float32 `[A]`, an expert's.
    """
    is_noisy = noise_range > 0

    def perturb(action: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        del is_first
        drawn = action + scale * noise_range * rng.standard_normal(action.shape)
        return np.where(is_noisy, np.clip(drawn, -noise_range, noise_range), action).astype(np.float32)

    return perturb


def _panda(init: Callable[[], Any], act: Callable) -> Expert:
    return Expert(init, act, np.array([1, 1, 1, 0, 0, 0, 0], np.float32))


def _widowx(task: widowx_experts.PickPlace) -> Expert:
    return Expert(
        widowx_experts.Memory, widowx_experts.make_act(task), np.array([0.05, 0.05, 0.05, 0, 0, 0, 0], np.float32)
    )


_EXPERTS: Mapping[str, Expert] = MappingProxyType(
    {
        "PushCube-v1": _panda(lambda: None, panda_experts.push_cube),
        "PullCube-v1": _panda(lambda: None, panda_experts.pull_cube),
        "StackCube-v1": _panda(panda_experts.StackMemory, panda_experts.stack_cube),
        "LiftPegUpright-v1": _panda(panda_experts.LiftMemory, panda_experts.lift_peg),
        "PutSpoonOnTableClothInScene-v1": _widowx(widowx_experts.SPOON),
        "PutCarrotOnPlateInScene-v1": _widowx(widowx_experts.CARROT),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": _widowx(widowx_experts.CUBE),
        "PutEggplantInBasketScene-v1": _widowx(widowx_experts.EGGPLANT),
    }
)
