"""pi0.5 as published and as RLinf trains it, the same network at sizes for CPUs, and what of them is trained."""

import dataclasses

from stare_jax.models.nn.gemma import GemmaConfig
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.siglip import SigLIPConfig
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.prompt import STATELESS_TEMPLATE

EXPERTS = (r"^PaliGemma/llm/layers/(attn|mlp)",)
"""what openpi adapts: all products of both language models; with `_1` behind the names, of the action expert."""
PALIGEMMA = r"^PaliGemma/(?:img/|llm/(?!.*_1/))(?!.*lora_[ab]$)"
"""regex of the vision tower and the language model without its action expert: what is frozen where the expert alone is
trained, as in pi_RL."""
_LAYERS = r"^PaliGemma/(?!.*lora_[ab]$)"


def pi05_base(tokenizer: str = "google/paligemma-3b-pt-224", **changes) -> Pi05Config:
    """Returns pi0.5 as published: SigLIP So400m/14, Gemma 2B, an action expert of 300M.

    Args:
        tokenizer: folder (or hub name) of PaliGemma's tokenizer; read when the first prompt is tokenised.
        **changes: fields of `Pi05Config` to replace.
    """
    heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    config = Pi05Config(
        siglip=SigLIPConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304),
        paligemma=GemmaConfig(width=2048, depth=18, mlp_dim=16384, **heads),
        expert=GemmaConfig(width=1024, depth=18, mlp_dim=4096, **heads),
        vocab_size=257_152,
        tokenizer=tokenizer,
        prompt_template=STATELESS_TEMPLATE,
        prompt_length=200,
        window=8,
        chunk=5,
        num_denoising_steps=4,
        execution=Execution(dtype="bfloat16", remat="full"),
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
    heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 24}
    config = Pi05Config(
        siglip=SigLIPConfig(width=96, depth=3, num_heads=3, mlp_dim=256, patch_size=2),
        paligemma=GemmaConfig(width=96, depth=3, mlp_dim=256, **heads),
        expert=GemmaConfig(width=96, depth=3, mlp_dim=256, **heads),
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
    heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
    config = Pi05Config(
        siglip=None,
        paligemma=GemmaConfig(width=64, depth=2, mlp_dim=192, **heads),
        expert=GemmaConfig(width=64, depth=2, mlp_dim=192, **heads),
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
