"""pi0.5 as published and as RLinf trains it, the same network at sizes for CPUs, and what of them is trained."""

import dataclasses

from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.lora import LoRAConfig, LoRAOverride
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.prompt import STATE_TEMPLATE, STATELESS_TEMPLATE

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
EXPERTS = (r"^PaliGemma/llm/layers/(attn|mlp)",)
"""regex of the modules that openpi adapts: all products of both language models."""
ACTION_EXPERT = r"^PaliGemma/llm/layers/(attn/\w+_1|mlp_1/\w+)$"
"""regex of those of the action expert, whose names end in `_1`."""
LORA = LoRAConfig(rank=16, alpha=16.0, targets=EXPERTS, overrides=(LoRAOverride(ACTION_EXPERT, rank=32, alpha=32.0),))
"""openpi's recipe: rank 16 in PaliGemma (`gemma_2b_lora`) and 32 in the action expert (`gemma_300m_lora`)."""
PALIGEMMA = r"^PaliGemma/(?:img/|llm/(?!.*_1/))(?!.*lora_[ab]$)"
"""regex of the vision tower and the language model without its action expert. Frozen, they leave the expert, the
projections and the heads to be trained, as in pi_RL."""
_LAYERS = r"^PaliGemma/(?!.*lora_[ab]$)"


def pi05_base(tokenizer: str = PALIGEMMA_TOKENIZER, **changes) -> Pi05Config:
    """Returns pi0.5 as openpi publishes it: SigLIP So400m/14, Gemma 2B and an action expert of 300M parameters.

    Source: openpi's `Pi0Config(pi05=True)` and its checkpoint pi05_base: a window of 50 actions, 10 denoising steps,
    the state in the prompt, three cameras, 200 tokens. A robot without one of the cameras leaves it out of `cameras`;
    openpi masks it, which gives the same numbers (see `Pi05Config.cameras`).

    No weight depends on `state_dim`, `action_dim` and `chunk`: they are the robot's. The values here are those of a
    single arm with 8 numbers of state and 7 of action; openpi leaves to its client how many actions of a window are
    executed, and half of them are here.

    Args:
        tokenizer: folder (or hub name) of PaliGemma's tokenizer; read when the first prompt is tokenised.
        **changes: fields of `Pi05Config` to replace.
    """
    config = Pi05Config(
        siglip=SigLIPConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304),
        paligemma=GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
        expert=GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
        vocab_size=257_152,
        tokenizer=tokenizer,
        prompt_template=STATE_TEMPLATE,
        prompt_length=200,
        window=50,
        chunk=25,
        state_dim=8,
        cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
        num_denoising_steps=10,
        execution=Execution(dtype="bfloat16", remat="full"),
    )
    return dataclasses.replace(config, **changes)


def pi05_droid(tokenizer: str = PALIGEMMA_TOKENIZER, **changes) -> Pi05Config:
    """Returns pi0.5 as openpi's checkpoint pi05_droid runs it.

    Differs from `pi05_base`: a window of 15 actions; an exterior camera and one on the wrist, and no second wrist; 8
    numbers of action, joint velocities and gripper, beside 8 of state, joint positions and gripper; 8 actions are
    executed, as openpi's DROID client does.

    Args:
        tokenizer: as for `pi05_base`.
        **changes: fields of `Pi05Config` to replace.
    """
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    config = pi05_base(tokenizer, window=15, chunk=8, action_dim=8, cameras=cameras)
    return dataclasses.replace(config, **changes)


def pi05_libero(tokenizer: str = PALIGEMMA_TOKENIZER, **changes) -> Pi05Config:
    """Returns pi0.5 as openpi's checkpoint pi05_libero runs it.

    Differs from `pi05_base`: a window of 10 actions, of which 5 are executed, as openpi's LIBERO client does; no state
    in the prompt (`discrete_state_input=False`); one camera above the table and one on the wrist.

    Args:
        tokenizer: as for `pi05_base`.
        **changes: fields of `Pi05Config` to replace.
    """
    config = pi05_base(
        tokenizer,
        window=10,
        chunk=5,
        prompt_template=STATELESS_TEMPLATE,
        state_dim=0,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
    )
    return dataclasses.replace(config, **changes)


def pi05_maniskill(tokenizer: str = PALIGEMMA_TOKENIZER, **changes) -> Pi05Config:
    """Returns pi0.5 as RLinf trains it by PPO in ManiSkill (pi_RL, arXiv:2510.25889).

    Differs from `pi05_base`: a window of 8 actions, of which 5 are executed; 4 denoising steps, all of them random
    (Flow-Noise); no state in the prompt; one camera. RLinf pads prompts to 200 tokens; 48 hold all instructions here
    and give the same numbers.

    Args:
        tokenizer: as for `pi05_base`.
        **changes: fields of `Pi05Config` to replace.
    """
    config = pi05_base(
        tokenizer,
        window=8,
        chunk=5,
        num_denoising_steps=4,
        noise="learned",
        prompt_template=STATELESS_TEMPLATE,
        prompt_length=48,
        state_dim=0,
        cameras=("3rd_view_camera",),
    )
    return dataclasses.replace(config, **changes)


def pi05_tiny(state_dim: int = 0, *, critic: str = "shared", **changes) -> Pi05Config:
    """Returns the same network at about a million parameters, for 64x64 images and training from scratch on CPUs.

    Args:
        state_dim: dimensions of the state that the prompt shows, binned; 0 shows none. With `critic` "state" the critic
            alone sees them.
        critic: what the value head reads, see `Pi05Config`.
        **changes: fields of `Pi05Config` to replace.
    """
    prompt_dim = 0 if critic == "state" else state_dim
    gemma = GemmaConfig(width=96, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=24)
    config = Pi05Config(
        siglip=SigLIPConfig(width=96, depth=3, num_heads=3, mlp_dim=256, patch_size=2),
        paligemma=gemma,
        expert=gemma,
        vocab_size=896,
        tokenizer="words",
        prompt_template="{instruction} {state}" if prompt_dim else "{instruction}",
        prompt_length=12 + 3 * prompt_dim,  # what is below the data's range is three tokens, " -" and "1"
        window=5,
        chunk=3,
        model_action_dim=7,
        state_dim=state_dim,
        cameras=("base_camera",),
        image_size=64,
        stem=(32, 64),
        num_denoising_steps=4,
        value_dims=(128, 64),
        critic=critic,
        execution=Execution(unroll=8),
    )
    return dataclasses.replace(config, **changes)


def pi05_state(state_dim: int = 29, **changes) -> Pi05Config:
    """Returns the same policy without eyes: the state is embedded in four tokens. For studies of algorithms on CPUs.

    Args:
        state_dim: dimensions of the state that is seen; 29 is that of `EnvConfig(use_state="low_dim")`.
        **changes: fields of `Pi05Config` to replace.
    """
    gemma = GemmaConfig(width=64, depth=2, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=16)
    config = Pi05Config(
        siglip=None,
        paligemma=gemma,
        expert=gemma,
        vocab_size=896,
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=12,
        window=4,
        chunk=2,
        model_action_dim=7,
        state_dim=state_dim,
        cameras=(),
        image_size=0,
        state_tokens=4,
        num_denoising_steps=4,
        value_dims=(128, 64),
        critic="state",
        execution=Execution(unroll=8),
    )
    return dataclasses.replace(config, **changes)


def all_frozen_patterns(config: Pi05Config) -> tuple[str, ...]:
    """Returns regexes of the parameters that are never trained: the configuration's own, and what adapters stand for.

    With adapters they are trained, and besides them the projections and heads outside PaliGemma.
    """
    return (*config.frozen_patterns, *(() if config.lora is None else (_LAYERS,)))


def for_robot(config: Pi05Config, action_dim: int, state_dim: int) -> Pi05Config:
    """Returns a model with a robot's numbers; a robot without a state takes the state out of the prompt."""
    is_shown = state_dim or "{state}" not in config.prompt_template
    template = config.prompt_template if is_shown else STATELESS_TEMPLATE
    return dataclasses.replace(config, action_dim=action_dim, state_dim=state_dim, prompt_template=template)
