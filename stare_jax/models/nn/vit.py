"""Vision transformers as timm builds them: DINOv2 with registers and LayerScale, and SigLIP.

OpenVLA uses the output of the second-to-last block, without the final norm. The last block, the final norm and SigLIP's
attention pool are in its checkpoints and not in this network; converters keep them aside.
"""

import dataclasses
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import Interval

from stare_jax.config import Count, Finite, Natural, Positive, check_fields
from stare_jax.models.nn.attention import KeyValue, self_attend
from stare_jax.models.nn.linear import Execution, Linear, gelu, scan_layers
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.nn.norms import layer_norm
from stare_jax.models.nn.placement import constrain_batch


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """One tower."""

    width: Count
    """size of a token of a patch."""
    depth: Annotated[int, Interval(ge=2)]
    """blocks in the checkpoint, two or more; the forward pass runs `depth - 1` of them."""
    num_heads: Count
    """attention heads, which divide the width among them."""
    mlp_dim: Count
    """size of the hidden layer of each MLP."""
    patch_size: Count = 14
    """side of a patch in pixels of the tower's input: the image, or the output of the stem where there is one."""
    num_prefix: Natural = 0
    """number of class token and registers, together, in front of the patches; they are dropped from the output."""
    layer_scale: Finite | None = None
    """initial value of LayerScale's vectors; None has none."""
    mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
    """mean of each channel of RGB in [0, 1], subtracted from images; `std`, which divides them, likewise."""
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """see `mean`."""

    def __post_init__(self):
        check_fields(self)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of width {self.width}")


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
    """Cuts `[B, H, W, C]` into row-major patches `[B, (H/p)(W/p), p, p, C]`."""
    batch, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    cut = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size, patch_size, channels)


def strided_windows(image: jax.Array) -> jax.Array:
    """Cuts `[B, H, W, C]` into the 3x3 windows of a convolution of stride 2, `[B, H/2, W/2, 3, 3, C]`.

    Window (i, j) starts at pixel (2i, 2j); zeros are added below and right. With the product that follows this is the
    convolution, at half the cost of the backward pass of XLA's own on CPUs.
    """
    _, height, width, _ = image.shape
    padded = jnp.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))
    rows = [[padded[:, i : i + height : 2, j : j + width : 2] for j in range(3)] for i in range(3)]
    return jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=3)


class ConvStem(nn.Module):
    """A small convolutional front for towers trained from scratch: 4x4 patches, then 3x3 convolutions of stride 2."""

    channels: tuple[int, ...]
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps `[B, H, W, 3]` to `[B, H/s, W/s, channels[-1]]`, s = `stem_stride(channels)`."""
        conv = partial(Linear, execution=self.execution, num_in_axes=3)
        x = conv(self.channels[:1], name="conv_0")(patchify(image, 4))
        x = gelu(x).reshape(x.shape[0], image.shape[1] // 4, image.shape[2] // 4, -1)
        for i, channels in enumerate(self.channels[1:], start=1):
            x = gelu(conv((channels,), name=f"conv_{i}")(strided_windows(x)))
        return x


def stem_stride(channels: tuple[int, ...]) -> int:
    """Returns the factor by which a stem with these channels shrinks an image; 1 without a stem."""
    return 4 * 2 ** (len(channels) - 1) if channels else 1


class ViTBlock(nn.Module):
    """A pre-norm transformer block: `x += ls1 · attn(norm1(x)); x += ls2 · mlp(norm2(x))`, with exact (erf) GELU."""

    config: ViTConfig
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        cfg, linear = self.config, partial(Linear, execution=self.execution, lora=self.lora)
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        qkv = linear((3, *heads), name="qkv")(self._norm(x, "norm1"))
        new, implementation = KeyValue(qkv[:, :, 1], qkv[:, :, 2]), self.execution.attention
        attended = self_attend(qkv[:, :, 0], new, None, is_causal=False, implementation=implementation)
        x = x + self._scale(linear((cfg.width,), num_in_axes=2, name="proj")(attended), "ls1")
        hidden = gelu(linear((cfg.mlp_dim,), name="fc1")(self._norm(x, "norm2")))
        return constrain_batch(x + self._scale(linear((cfg.width,), name="fc2")(hidden), "ls2")), None

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return layer_norm(self.execution, name)(x)

    def _scale(self, x: jax.Array, name: str) -> jax.Array:
        """Applies LayerScale, where the tower has it."""
        if self.config.layer_scale is None:
            return x
        init = nn.initializers.constant(self.config.layer_scale)
        return x * self.param(name, init, (self.config.width,), self.execution.param_dtype).astype(x.dtype)


class ViT(nn.Module):
    """A tower: patches, positions, `depth - 1` blocks."""

    config: ViTConfig
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps normalised images (or stem features) `[B, H, W, C]` to patch features `[B, patches, width]`."""
        cfg, param_dtype = self.config, self.execution.param_dtype
        # Wide enough to tell patches apart from the first step on; timm's 0.02 learns positions late from scratch.
        init = nn.initializers.normal(cfg.width**-0.5)
        embed = Linear((cfg.width,), self.execution, num_in_axes=3, lora=self.lora, name="patch_embed")
        x = embed(patchify(image, cfg.patch_size))
        x = x + self.param("pos_embed", init, (1, *x.shape[1:]), param_dtype).astype(x.dtype)
        if cfg.num_prefix:  # after the positions: timm's `no_embed_class`
            tokens = [self.param("cls_token", init, (1, 1, cfg.width), param_dtype)]
            if cfg.num_prefix > 1:
                tokens.append(self.param("reg_token", init, (1, cfg.num_prefix - 1, cfg.width), param_dtype))
            prefix = jnp.concatenate(tokens, axis=1).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:])), x], axis=1)
        blocks = scan_layers(ViTBlock, cfg.depth - 1, self.execution)
        x, _ = blocks(cfg, self.execution, self.lora, name="blocks")(x)
        return x[:, cfg.num_prefix :]
