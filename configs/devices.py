"""Devices that the recipes are for, and what is computed on them at a time, by what is trained.

Numbers are those of docs/plan.md, which says how they were found.
"""

from collections.abc import Collection
from typing import NamedTuple

import ml_collections


class Passes(NamedTuple):
    """Rows of one forward and backward pass of each phase, on all devices together; None: of a whole batch."""

    sft: int | None
    tpo: int | None
    ppo: int | None
    remat: str
    """see `Execution.remat`."""


ON_NODE = {
    "openvla": Passes(None, 160, None, "dots"),
    "openvla full": Passes(None, 16, 8, "full"),
    "pi05": Passes(None, 96, 1920, "full"),
    "pi05 lora": Passes(None, 96, 320, "dots"),
    "pi05 full": Passes(64, 16, 64, "full"),
}
ON_ONE_GPU = {
    "openvla": Passes(32, 32, 32, "dots"),
    "pi05": Passes(128, 48, 320, "full"),
    "pi05 lora": Passes(64, 48, 64, "dots"),
}
CONTEXT_GB = 27.0
"""memory of the contexts of a rollout of pi0.5 with its action expert trained: 3840 decisions of 5.6 MB, and those of
environments that are idle while the last episodes end"""
FULL_GB = {"openvla full": 150, "pi05 full": 81}
"""weights, two moments of Adam, the gradients of a pass and their sum in float32, 20 bytes for each weight; 4 more for
pi0.5, whose imitation keeps an average, and whose PPO the policy that it starts from"""


def set_node(config: ml_collections.ConfigDict, words: Collection[str]) -> None:
    """Spreads a run over a node of eight accelerators of 80 GB.

    Where most weights are frozen, in bfloat16, every device has a copy of the model and rows of its own, and all that
    is exchanged are gradients, once a pass. Weights that are all trained are cut over the devices.
    """
    trained = _trained(words)
    config.mesh.fsdp = 8 if trained.endswith("full") else 1
    set_passes(config, ON_NODE[trained])
    _keep_contexts(config, trained)


def set_one_gpu(config: ml_collections.ConfigDict, words: Collection[str]) -> None:
    """Fits a run on one accelerator of 80 GB beside a processor of some 16 cores.

    Raises:
        ValueError: all weights are to be trained, which takes more memory.
    """
    trained = _trained(words)
    if trained not in ON_ONE_GPU:
        needed = f"weights, gradients and optimiser take {FULL_GB[trained]} GB, of 80, without any activation"
        raise ValueError(f"variant: got one_gpu and full, expected one of them: {needed}")
    config.mesh.data = 1
    config.env.num_workers, config.env.envs_per_worker = 16, 4
    set_passes(config, ON_ONE_GPU[trained])
    _keep_contexts(config, trained)


def _trained(words: Collection[str]) -> str:
    """Returns the model and what of it is trained, a key of `ON_NODE`."""
    model = "pi05" if "pi05" in words else "openvla"
    if "full" in words:
        return f"{model} full"
    return "pi05 lora" if {"pi05", "lora"} <= set(words) else model


def set_passes(config: ml_collections.ConfigDict, passes: Passes) -> None:
    for phase in ("sft", "tpo", "ppo"):
        config[phase].microbatch_size = getattr(passes, phase)
    config.model.execution.remat = passes.remat


def _keep_contexts(config: ml_collections.ConfigDict, trained: str) -> None:
    if trained == "pi05":  # whose tower and language model are frozen, so that contexts are constants
        config.ppo.context_gb = CONTEXT_GB
