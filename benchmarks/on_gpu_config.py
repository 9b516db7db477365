"""Configurations whose iterations `on_gpu.sh` measures: the recipes, shorter and for one device, or small models."""

import dataclasses

from configs.ipi_maniskill import get_config as get_recipe
from configs.presets import base_config, set_recipe
from stare_jax.envs import EnvConfig
from stare_jax.models import PI05_PALIGEMMA, LoRAConfig, openvla_tiny, pi05_tiny
from stare_jax.models.nn.linear import Execution

NUM_DECISIONS = 64
"""Decisions of an iteration, all of them in one minibatch."""


def get_config(variant: str):
    """Returns a configuration; `variant` is "openvla" or "pi05", and for a small model ",reduced" behind it."""
    name, _, size = variant.partition(",")
    if name not in ("openvla", "pi05") or size not in ("", "reduced"):
        raise ValueError(f"variant: got {variant!r}, expected openvla or pi05, and perhaps ,reduced")
    words = () if name == "openvla" else ("pi05",)
    if size:
        config = base_config(EnvConfig("PushCube-v1", image_size=64), _reduced_model(name), name=f"reduced_{name}")
        set_recipe(config, words)
    else:
        config = get_recipe(",".join(("PushCube-v1", *words)))
    config.model.tokenizer, config.model.prompt_template = "words", "{instruction}"
    config.mesh.fsdp = 1
    # Two decisions an episode, whatever the number of actions that one executes.
    config.env.horizon = 2 * config.model.get("chunk", 1)
    num_decisions = 16 if size else NUM_DECISIONS
    config.env.num_workers, config.env.envs_per_worker = num_decisions // 2, 1
    config.ppo.num_episodes = num_decisions // 2
    config.ppo.minibatch_size = num_decisions
    config.ppo.microbatch_size = num_decisions // 2 if size else 16
    config.ppo.num_epochs = min(config.ppo.num_epochs, 2)
    return config


def _reduced_model(name: str):
    """Returns a small model with the types and the trained parts of the full one."""
    execution = Execution(dtype="bfloat16", param_dtype="bfloat16")
    if name == "openvla":
        return openvla_tiny(lora=LoRAConfig(rank=4), execution=execution)
    execution = dataclasses.replace(execution, param_dtype="float32")
    return pi05_tiny(frozen_patterns=(PI05_PALIGEMMA,), execution=execution)
