"""Settings that several configurations share: the defaults as one `ConfigDict`, policies for a CPU, published recipes.

Every function that takes a configuration changes it in place. A configuration file lists what differs from these.
"""

import dataclasses
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from configs.devices import set_node, set_one_gpu
from configs.methods import METHODS, named_method, set_method
from stare_jax.config import choices, to_dict
from stare_jax.envs import EnvConfig
from stare_jax.models import (
    PI05_EXPERTS,
    PI05_PALIGEMMA,
    LoRAConfig,
    ModelConfig,
    OpenVLAConfig,
    Pi05Config,
    openvla_7b,
    pi05_maniskill,
)
from stare_jax.runs.config import RunConfig
from stare_jax.stages import StageParams

WORDS = ("pi05", "full", "lora", "one_gpu", *METHODS)
"""Words of the recipes' variants. pi05: pi0.5 in place of OpenVLA-7B. full: all weights are trained. lora: adapters are
trained, which is OpenVLA's default, while pi0.5 trains its action expert alone. one_gpu: for one accelerator of 80 GB,
in place of a node of eight. The rest are `methods.METHODS`, of which IPI is the one without a word."""


UNIONS = (typing.Union, types.UnionType)
"""ways in which Python has an annotation `a | b`; the first where a part is an `Annotated`"""


# ---- Every configuration -------------------------------------------------------------------------------------------


def base_config(env: EnvConfig, model: ModelConfig, *, name: str) -> ml_collections.ConfigDict:
    """Returns the whole configuration of a run, every field of which can be overridden as `--config.ppo.gamma=0.98`.

    Args:
        env: the task and its simulators.
        model: the policy.
        name: of the run, which is kept in `runs/<name>` unless `--workdir` says otherwise.
    """
    values = _with_placeholders(RunConfig(env=env, model=model, stages=env.spec.params))
    # Not the numbers of this task: they follow the task that the command line may name (`RunConfig.fill_in`).
    values["stages"] = {name: _placeholder(hint) for name, hint in typing.get_type_hints(StageParams).items()}
    config = ml_collections.ConfigDict(values, type_safe=False)
    config.name = name
    for section in ("demos", "sft", "pairs", "ppo", "tpo"):
        config[section].seed = config.get_ref("seed")
    return config


def split_variant(variant: str, *, tasks: Sequence[str], words: Sequence[str]) -> tuple[tuple[str, ...], set[str]]:
    """Returns the task of a variant such as "StackCube-v1,pi05,full", all tasks where none is named, and the rest.

    Args:
        variant: the text behind the colon of `--config`.
        tasks: environments to choose from.
        words: other words that may stand there.

    Raises:
        ValueError: another word stands there, or two tasks.
    """
    parts = [part for part in variant.split(",") if part]
    named = [part for part in parts if part in tasks]
    if unknown := set(parts) - set(tasks) - set(words):
        raise ValueError(f"variant: got {', '.join(sorted(unknown))}, expected some of {', '.join((*words, *tasks))}")
    if len(named) > 1:
        raise ValueError(f"variant: got {', '.join(named)}, expected one task")
    return tuple(named or tasks), set(parts) - set(named)


def _with_placeholders(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested dicts. A field that is None, but may hold a value, gets a placeholder of the
    value's type: without one it could not be given on the command line."""
    hints, values = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            value = _with_placeholders(value)
        elif value is None and typing.get_origin(hint) in UNIONS:
            value = _placeholder(hint)
        else:
            value = to_dict(value)
        values[field.name] = value
    return values


def _placeholder(hint: Any) -> Any:
    """Returns a place for a value of an annotated type, such as `float | None`; None for the place of a dataclass."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    (part,) = (part for part in parts if part is not types.NoneType)
    kind = type(choices(part)[0]) if choices(part) else typing.get_origin(part) or part
    return None if dataclasses.is_dataclass(kind) else config_dict.placeholder(kind)


# ---- Small policies on a CPU ---------------------------------------------------------------------------------------


def demos_with_recoveries(config: ml_collections.ConfigDict) -> None:
    """Collects 760 demonstrations, most of them disturbed by noise, so that recoveries are among them."""
    config.demos.num_demos = 760
    config.demos.noise_scales = ((0.0, 100.0), (0.15, 594.0), (0.3, 66.0))


def imitation_on_cpu(config: ml_collections.ConfigDict, num_steps: int) -> None:
    """Imitates with a policy of a million parameters, from random weights.

    Args:
        config: of a run.
        num_steps: optimiser steps; a checkpoint is kept every quarter of them.
    """
    config.sft.num_steps = num_steps
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = -(-num_steps // 4)


def preference_on_cpu(config: ml_collections.ConfigDict) -> None:
    """Learns from 50 pairs of the imitation's own rollouts."""
    config.pairs.num_pairs = 50
    config.pairs.rollouts_per_seed = 4
    config.pairs.max_rollouts = 160
    config.tpo.num_epochs = 2
    config.tpo.optimizer.learning_rate = 1e-5
    config.tpo.batch_size = 4
    config.tpo.checkpoint_every = 10


def interaction_on_cpu(config: ml_collections.ConfigDict) -> None:
    """Sets PPO as it was found to learn PushCube from the state; docs/ppo.md says what each number does."""
    config.ppo.num_iterations = 120
    config.ppo.num_episodes = 96
    config.ppo.num_epochs = 4
    config.ppo.minibatch_size = 512
    config.ppo.target_kl = 0.15
    config.ppo.gae_lambda = 0.8
    config.ppo.value_warmup_iterations = 1
    config.ppo.optimizer.learning_rate = 3e-4
    config.ppo.optimizer.value_learning_rate = 3e-3
    config.ppo.optimizer.warmup_steps = 20
    config.ppo.optimizer.schedule = "linear"
    config.ppo.checkpoint_every = 10
    # The policy is judged as it acts: an arg max over bins that were taught to be blurred is another, worse policy.
    config.evaluation.temperature = 1.0
    config.evaluation.num_episodes = 300


# ---- Recipes for policies of full size -----------------------------------------------------------------------------


def make_model(words: Collection[str], *, camera: str) -> OpenVLAConfig | Pi05Config:
    """Returns the model of a recipe; the weights that it trains are float32, beside frozen ones in bfloat16.

    Args:
        words: of `WORDS`.
        camera: whose images the policy sees.
    """
    words = set(words)
    if {"full", "lora"} <= words:
        raise ValueError("variant: got full and lora, expected one of them")
    if "pi05" in words:
        # The numbers of pi_RL on ManiSkill (RLinf): Flow-Noise, 4 steps, 5 of 8 actions.
        model = pi05_maniskill(cameras=(camera,))
        frozen = () if words & {"full", "lora"} else (PI05_PALIGEMMA,)
        lora = LoRAConfig(rank=32, alpha=32.0, targets=PI05_EXPERTS) if "lora" in words else None
        return dataclasses.replace(model, frozen_patterns=frozen, lora=lora)
    model = openvla_7b(camera=camera)
    if "full" in words:
        return dataclasses.replace(model, execution=dataclasses.replace(model.execution, param_dtype="float32"))
    return dataclasses.replace(model, lora=LoRAConfig())


def set_recipe(config: ml_collections.ConfigDict, words: Collection[str]) -> None:
    """Sets the numbers of appendix B and C.2; where the paper is silent RL4VLA's, or openpi's and RLinf's for pi0.5."""
    set_method(config, named_method(words, default="ipi"))
    config.demos.num_demos = 100
    config.pairs.num_pairs = 50
    config.tpo.num_epochs = 5
    config.tpo.batch_size = 8
    config.tpo.optimizer.learning_rate = 2e-5
    config.ppo.num_iterations = 400
    config.ppo.value_clip_eps = 0.2
    config.ppo.huber_delta = 10.0
    config.evaluation.num_episodes = 300
    (set_flow if "pi05" in words else set_tokens)(config)
    (set_one_gpu if "one_gpu" in words else set_node)(config, words)


def set_tokens(config: ml_collections.ConfigDict) -> None:
    """Sets the numbers of OpenVLA, whose decisions are tokens."""
    config.sft.num_steps = 30_000
    config.sft.batch_size = 64
    config.sft.optimizer.learning_rate = 1e-5
    config.ppo.num_episodes = 128
    config.ppo.minibatch_size = 160
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.optimizer.value_learning_rate = 3e-3


def set_flow(config: ml_collections.ConfigDict) -> None:
    """Sets the numbers of pi0.5, whose decisions are chunks that flow from noise."""
    for section in ("sft", "tpo", "ppo"):
        config[section].optimizer.b2 = 0.95
    config.sft.num_steps = 5000
    config.sft.batch_size = 256
    config.sft.ema_decay = 0.999
    config.sft.optimizer.learning_rate = 2.5e-5
    config.sft.optimizer.warmup_steps = 1000
    config.sft.optimizer.schedule = "cosine"  # down to zero; openpi ends at a tenth
    config.sft.optimizer.weight_decay = 1e-10
    config.ppo.num_episodes = 320
    config.ppo.num_epochs = 5
    # One minibatch of all decisions there can be, as 320 episodes of 80 actions are in RLinf.
    config.ppo.minibatch_size = config.ppo.num_episodes * -(-config.env.horizon // config.model.chunk)
    config.ppo.entropy_coef = 0.005
    config.ppo.kl_coef = 0.0  # measured
    config.ppo.optimizer.learning_rate = 7.91e-6
    config.ppo.optimizer.value_learning_rate = 1.55e-4
    config.ppo.optimizer.max_grad_norm = 1.0
