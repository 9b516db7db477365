"""Cases of `openvla.py`: sizes, inputs and weights, the same for every implementation.

Weights are cut from one block of random numbers, at a place that the tensor's name determines. So a model of any size
is filled on its device in seconds, and equally by frameworks with different random number generators.
"""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from stare_jax.models import OpenVLAConfig, openvla_7b
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.lora import LoRAConfig

BLOCK_SIZE = 1_048_573  # prime, so that rows of matrices do not repeat
LORA = LoRAConfig()


@dataclasses.dataclass(frozen=True)
class Spec:
    """One measurement of one implementation; travels to its process as JSON."""

    size: str
    """"7b" or "reduced"."""
    dtype: str
    cases: tuple[str, ...]
    """Some of "generate" and "update"."""
    batches: tuple[int, ...]
    prompt_length: int
    update_batch: int
    microbatch: int
    remat: str
    """ours: "none", "full" or "dots"."""
    attention: str
    unstack: bool
    torch_remat: bool
    torch_compile: bool
    repeats: int
    seed: int
    profile: str | None


def make_config(spec: Spec) -> OpenVLAConfig:
    """Returns the model with adapters, as it acts and is trained."""
    execution = Execution(dtype=spec.dtype, param_dtype=spec.dtype, attention=spec.attention, remat=spec.remat)
    config = openvla_7b(prompt_length=spec.prompt_length, execution=execution, unstack_layers=spec.unstack, lora=LORA)
    if spec.size == "7b":
        return config
    return dataclasses.replace(
        config,
        dino=dataclasses.replace(config.dino, width=128, depth=4, num_heads=2, mlp_dim=512),
        siglip=dataclasses.replace(config.siglip, width=144, depth=4, num_heads=2, mlp_dim=538),
        projector_dim=1088,
        llm=LlamaConfig(vocab_size=32064, width=512, depth=4, num_heads=4, num_kv_heads=4, mlp_dim=1376),
        image_size=112,
    )


class Inputs(NamedTuple):
    """Prompts without padding, and decisions to learn from."""

    images: np.ndarray
    """uint8 `[B, H, W, 3]`."""
    ids: np.ndarray
    """int32 `[B, L]`."""
    bins: np.ndarray
    """int32 `[B, A]`."""
    old_logp: np.ndarray
    """float32 `[B]`, the sum over tokens; and likewise below."""
    old_value: np.ndarray
    advantage: np.ndarray
    return_: np.ndarray


def make_inputs(config: OpenVLAConfig, batch: int, seed: int) -> Inputs:
    rng = np.random.default_rng([seed, batch])
    ids = rng.integers(3, config.action_vocab_end - 256, (batch, config.prompt_length), dtype=np.int32)
    ids[:, 0] = 1
    scores = (rng.normal(size=batch).astype(np.float32) for _ in range(4))
    return Inputs(
        rng.integers(0, 256, (batch, config.image_size, config.image_size, 3), dtype=np.uint8),
        ids,
        rng.integers(0, 256, (batch, config.action_dim), dtype=np.int32),
        *scores,
    )


def make_block(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=BLOCK_SIZE).astype(np.float32)


def weight_recipe(name: str, shape: tuple[int, ...]) -> tuple[int, float, float]:
    """Returns (offset, scale, shift): the tensor is `scale * block + shift`, read from `offset` on, over and over."""
    offset = zlib.crc32(name.encode()) % BLOCK_SIZE
    if len(shape) > 1:
        is_token = name.endswith(("cls_token", "reg_token", "pos_embed"))
        return offset, 0.02 if is_token else float(np.prod(shape[1:])) ** -0.5, 0.0
    return offset, 0.02, 0.0 if name.endswith("bias") else 1.0
