"""Vision transformers as timm builds them: DINOv2 with registers and LayerScale, and SigLIP.

Only what OpenVLA runs is here: the output of the second-to-last block, without the final norm. The last block, the final
norm and SigLIP's attention pool exist in checkpoints but hold no parameters of ours; converters keep them aside.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from stare_jax.models.attention import KeyValue, attend

LAYER_NORM_EPS = 1e-6
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a stack of layers is computed, apart from what it computes."""

    dtype: str = "float32"
    """of activations and matrix products."""
    param_dtype: str = "float32"
    remat: str = "none"
    """"none", "full" (recompute every layer in the backward pass) or "dots" (keep matrix products)."""
    unroll: int = 1
    """layers per iteration of the scan over layers."""

    def __post_init__(self):
        if self.remat not in ("none", *REMAT_POLICIES):
            raise ValueError(f"remat: got {self.remat!r}, expected one of {('none', *REMAT_POLICIES)}")
        if self.unroll < 1:
            raise ValueError(f"unroll: got {self.unroll}, expected at least 1")


def scan_layers(block: type[nn.Module], depth: int, execution: Execution, num_broadcast: int, num_scanned: int = 0):
    """Returns `block` repeated `depth` times with parameters stacked on a leading axis.

    Args:
        block: module class whose call maps (carry, *scanned, *broadcast) to (carry, output).
        depth: number of layers.
        execution: unrolling and rematerialisation.
        num_broadcast: arguments that every layer gets as they are.
        num_scanned: arguments, before those, with a leading axis of layers.
    """
    if execution.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[execution.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0,) * num_scanned + (nn.broadcast,) * num_broadcast,
        length=depth,
        unroll=min(execution.unroll, depth),
    )


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of one tower; the defaults of every field but the sizes are timm's."""

    width: int
    depth: int
    """blocks in the checkpoint; the forward pass runs `depth - 1` of them."""
    num_heads: int
    mlp_dim: int
    patch_size: int = 14
    """in pixels of the tower's input: of the image, or of the stem's output where there is a stem."""
    num_prefix: int = 0
    """a class token and registers, `num_prefix` in all, in front of the patches; dropped from the output."""
    layer_scale: float | None = None
    """initial value of LayerScale's vectors; None has none."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """of RGB in [0, 1], for normalising images."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of width {self.width}")
        if self.depth < 2:
            raise ValueError(f"depth: got {self.depth}, expected at least 2, as the last block is not run")


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
    """Cuts `[B, H, W, C]` into row-major patches `[B, (H/p)(W/p), p·p·C]`."""
    batch, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    cut = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size * patch_size * channels)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel size, as one matrix product; `[B, H, W, C]` to `[B, patches, width]`."""

    width: int
    patch_size: int
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        shape = (self.patch_size, self.patch_size, image.shape[-1], self.width)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, shape, self.execution.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.execution.param_dtype)
        patches, kernel, bias = nn.dtypes.promote_dtype(
            patchify(image, self.patch_size), kernel, bias, dtype=self.execution.dtype
        )
        return patches @ kernel.reshape(-1, self.width) + bias


class StridedConv(nn.Module):
    """A 3x3 convolution of stride 2 that pads below and right, as nine shifted views and one matrix product.

    XLA's CPU convolution takes twice as long in the backward pass.
    """

    width: int
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/2, W/2, width]`."""
        batch, height, width, channels = image.shape
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (3, 3, channels, self.width), self.execution.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.execution.param_dtype)
        image, kernel, bias = nn.dtypes.promote_dtype(image, kernel, bias, dtype=self.execution.dtype)
        padded = jnp.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))
        shifts = [padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for i in range(3) for j in range(3)]
        out = jnp.concatenate(shifts, axis=-1).reshape(-1, 9 * channels) @ kernel.reshape(-1, self.width) + bias
        return out.reshape(batch, height // 2, width // 2, self.width)


class ConvStem(nn.Module):
    """A small convolutional front for towers trained from scratch: 4x4 patches, then 3x3 convolutions of stride 2."""

    channels: tuple[int, ...]
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps `[B, H, W, 3]` to `[B, H/s, W/s, channels[-1]]`, s = `stem_stride(channels)`."""
        batch, height, width, _ = image.shape
        x = PatchEmbed(self.channels[0], 4, self.execution, name="patch_embed")(image)
        x = nn.gelu(x, approximate=False).reshape(batch, height // 4, width // 4, self.channels[0])
        for i, channels in enumerate(self.channels[1:]):
            x = nn.gelu(StridedConv(channels, self.execution, name=f"conv_{i}")(x), approximate=False)
        return x


def stem_stride(channels: tuple[int, ...]) -> int:
    """Returns by how much a stem with these channels shrinks an image; 1 without a stem."""
    return 4 * 2 ** (len(channels) - 1) if channels else 1


class ViTBlock(nn.Module):
    """A pre-norm transformer block: `x += ls1 · attn(norm1(x)); x += ls2 · mlp(norm2(x))`, with exact (erf) GELU."""

    config: ViTConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        cfg = self.config
        types = dict(dtype=self.execution.dtype, param_dtype=self.execution.param_dtype)
        norm = partial(nn.LayerNorm, epsilon=LAYER_NORM_EPS, use_fast_variance=False, **types)
        qkv = nn.DenseGeneral((3, cfg.num_heads, cfg.width // cfg.num_heads), name="qkv", **types)(
            norm(name="norm1")(x)
        )
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        attended = attend(query, [KeyValue(key, value)], [None])
        x = x + self._scaled(nn.DenseGeneral(cfg.width, axis=(-2, -1), name="proj", **types)(attended), "ls1")
        hidden = nn.gelu(nn.Dense(cfg.mlp_dim, name="fc1", **types)(norm(name="norm2")(x)), approximate=False)
        return x + self._scaled(nn.Dense(cfg.width, name="fc2", **types)(hidden), "ls2"), None

    def _scaled(self, x: jax.Array, name: str) -> jax.Array:
        """Applies LayerScale, where the tower has it."""
        if self.config.layer_scale is None:
            return x
        init = nn.initializers.constant(self.config.layer_scale)
        return x * self.param(name, init, (self.config.width,), self.execution.param_dtype).astype(x.dtype)


class ViT(nn.Module):
    """A tower: patches, positions, `depth - 1` blocks."""

    config: ViTConfig
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps normalised images (or stem features) `[B, H, W, C]` to patch features `[B, patches, width]`."""
        cfg, param_dtype = self.config, self.execution.param_dtype
        x = PatchEmbed(cfg.width, cfg.patch_size, self.execution, name="patch_embed")(image)
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embed", init, (1, *x.shape[1:]), param_dtype).astype(x.dtype)
        if cfg.num_prefix:  # after the positions: timm's `no_embed_class`
            tokens = [self.param("cls_token", init, (1, 1, cfg.width), param_dtype)]
            if cfg.num_prefix > 1:
                tokens.append(self.param("reg_token", init, (1, cfg.num_prefix - 1, cfg.width), param_dtype))
            prefix = jnp.concatenate(tokens, axis=1).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:])), x], axis=1)
        blocks = scan_layers(ViTBlock, cfg.depth - 1, self.execution, num_broadcast=0)
        x, _ = blocks(cfg, self.execution, name="blocks")(x)
        return x[:, cfg.num_prefix :]
