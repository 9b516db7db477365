"""Closed-loop experts: pure functions of `Signals` and a small memory, in the policy's own action space.

They look at every state anew, so they recover from whatever was executed instead of what they decided: demonstrations
with execution noise keep clean labels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.experts import panda as panda_experts
from stare_jax.envs.experts import widowx as widowx_experts
from stare_jax.envs.maniskill.scenes import SCENES
from stare_jax.types import Signals

Act = Callable[[Signals, Any], tuple[np.ndarray, Any]]


class Expert(NamedTuple):
    """One environment's expert; loop over environments, or over the rows of a batch."""

    init: Callable[[], Any]
    """() -> the memory of an episode that begins."""
    act: Act
    """(signals of one state, memory) -> (action float32 `[A]`, memory)."""
    action_scale: tuple[float, ...]
    """`[A]`, the task's `Scene.action_scale`: what noise and idle actions are measured by."""


def make_expert(env_id: str, *, limit: float = 1.0) -> Expert:
    """Returns the expert of a task, for the task's default control mode.

    Args:
        env_id: of the task.
        limit: largest component of a translation, as a fraction of its `action_scale`: below 1 the expert moves more
            slowly and seldom at the end of its range. Longer translations keep their direction.

    Raises:
        ValueError: there is none for this task, or the limit is not a fraction.
    """
    if env_id not in _EXPERTS:
        raise ValueError(f"env_id: got {env_id!r}, expected one of {sorted(_EXPERTS)}")
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit: got {limit}, expected 0 < limit <= 1")
    (init, act), action_scale = _EXPERTS[env_id], SCENES[env_id].action_scale
    return Expert(init, act if limit == 1.0 else _limited(act, limit, action_scale), action_scale)


def _limited(act: Act, limit: float, action_scale: Sequence[float]) -> Act:
    """Returns an expert's `act` with shorter translations."""
    longest = limit * np.array(action_scale[:3])

    def limited(signals: Signals, memory: Any) -> tuple[np.ndarray, Any]:
        action, memory = act(signals, memory)
        excess = np.abs(action[:3] / longest).max()
        action[:3] /= max(1.0, excess)
        return action, memory

    return limited


def execution_noise(
    seeds: Sequence[int], scales: Sequence[float], action_scale: Sequence[float]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns `perturb(action [B, A], is_first [B])`: the action with Gaussian noise on its translation, clipped.

    The noise of an episode follows from its seed alone, whichever environment it is in.

    Args:
        seeds: one an episode, in the order in which episodes begin; rows that begin in the same call count upwards.
        scales: one an episode: standard deviation as a fraction of the action's range; 0 leaves every action as it is.
        action_scale: `[A]`, an expert's, which is that range.
    """
    span = np.array(action_scale[:3])
    episodes = zip(seeds, scales, strict=True)
    running: dict[int, tuple[np.random.Generator, float]] = {}

    def perturb(action: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        for row in np.flatnonzero(is_first):
            seed, scale = next(episodes)
            # A stream of its own: the simulator draws the first state from the same seed.
            running[row] = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))), scale
        perturbed = np.array(action, np.float32)
        for row, (generator, scale) in running.items():
            drawn = action[row, :3] + scale * span * generator.standard_normal(len(span))
            perturbed[row, :3] = np.clip(drawn, -span, span)
        return perturbed

    return perturb


_EXPERTS: Mapping[str, tuple[Callable[[], Any], Act]] = MappingProxyType(
    {
        "PushCube-v1": (lambda: None, panda_experts.push_cube),
        "PullCube-v1": (lambda: None, panda_experts.pull_cube),
        "StackCube-v1": (panda_experts.StackMemory, panda_experts.stack_cube),
        "LiftPegUpright-v1": (panda_experts.LiftMemory, panda_experts.lift_peg),
        "PutSpoonOnTableClothInScene-v1": (widowx_experts.Memory, widowx_experts.make_act(widowx_experts.SPOON)),
        "PutCarrotOnPlateInScene-v1": (widowx_experts.Memory, widowx_experts.make_act(widowx_experts.CARROT)),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": (
            widowx_experts.Memory,
            widowx_experts.make_act(widowx_experts.CUBE),
        ),
        "PutEggplantInBasketScene-v1": (widowx_experts.Memory, widowx_experts.make_act(widowx_experts.EGGPLANT)),
    }
)
