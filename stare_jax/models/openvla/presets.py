"""OpenVLA as published, the same network at sizes for CPUs, and the parameters that no phase trains."""

import dataclasses

from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.lora import BASE_PATTERN
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.models.openvla.prompt import OPENVLA_TEMPLATE


def openvla_7b(tokenizer: str = "openvla/openvla-7b", **changes) -> OpenVLAConfig:
    """Returns OpenVLA-7B as published: DINOv2 ViT-L/14 with registers, SigLIP So400m/14, Llama 2 7B.

    Args:
        tokenizer: folder (or hub name) of the checkpoint's tokenizer; read when the first prompt is tokenised.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    config = OpenVLAConfig(
        dino=ViTConfig(
            width=1024,
            depth=24,
            num_heads=16,
            mlp_dim=4096,
            num_prefix=5,
            layer_scale=1e-5,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        siglip=ViTConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304),
        projector_dim=8704,
        llm=LlamaConfig(vocab_size=32064, width=4096, depth=32, num_heads=32, num_kv_heads=32, mlp_dim=11008),
        action_vocab_end=32000,
        tokenizer=tokenizer,
        prompt_template=OPENVLA_TEMPLATE,
        prompt_length=40,
        camera="3rd_view_camera",
        execution=Execution(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    )
    return dataclasses.replace(config, **changes)


def openvla_tiny(state_dim: int = 0, *, critic: str = "shared", **changes) -> OpenVLAConfig:
    """Returns the same network at about a million parameters, for 64x64 images and training from scratch on CPUs.

    Args:
        state_dim: dimensions of the state that the prompt shows, binned; 0 shows none. With `critic` "state" the critic
            alone sees them.
        critic: what the value head reads, see `OpenVLAConfig`.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    prompt_dim = 0 if critic == "state" else state_dim
    tower = ViTConfig(width=64, depth=3, num_heads=2, mlp_dim=256, patch_size=2)
    config = OpenVLAConfig(
        dino=dataclasses.replace(tower, num_prefix=2, layer_scale=1.0),
        siglip=tower,
        projector_dim=256,
        llm=LlamaConfig(vocab_size=896, width=96, depth=3, num_heads=4, num_kv_heads=4, mlp_dim=256),
        action_vocab_end=896,
        tokenizer="words",
        prompt_template="{instruction} {state}" if prompt_dim else "{instruction}",
        prompt_length=12 + prompt_dim,
        image_size=64,
        stem=(32, 64),
        state_dim=state_dim,
        label_width=5.0,
        restrict_logits=True,
        value_dims=(128, 64),
        critic=critic,
        execution=Execution(unroll=8),
        decode_unroll=8,
    )
    return dataclasses.replace(config, **changes)


def openvla_state(state_dim: int = 29, **changes) -> OpenVLAConfig:
    """Returns the same policy without eyes: the state is embedded in four tokens. For studies of algorithms on CPUs.

    Args:
        state_dim: dimensions of the state that is seen; 29 is that of `EnvConfig(use_state="low_dim")`.
        **changes: fields of `OpenVLAConfig` to replace.
    """
    config = OpenVLAConfig(
        dino=None,
        siglip=None,
        projector_dim=0,
        llm=LlamaConfig(vocab_size=896, width=64, depth=2, num_heads=4, num_kv_heads=4, mlp_dim=192),
        action_vocab_end=896,
        tokenizer="words",
        prompt_template="{instruction}",
        prompt_length=12,
        image_size=0,
        state_tokens=4,
        state_dim=state_dim,
        label_width=5.0,
        restrict_logits=True,
        greedy="mean",
        value_dims=(128, 64),
        critic="own",
        execution=Execution(unroll=8),
        decode_unroll=8,
    )
    return dataclasses.replace(config, **changes)


def all_frozen_patterns(config: OpenVLAConfig) -> tuple[str, ...]:
    """Returns regexes of the parameters that are never trained: the configuration's own, and what adapters stand for.

    With adapters, only they and the value head are trained.
    """
    return (*config.frozen_patterns, *(() if config.lora is None else (BASE_PATTERN,)))
