"""The SigLIP tower of PaliGemma: all blocks, final norm, projection; with the parameter names of openpi's files."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from stare_jax.config import Count, check_fields
from stare_jax.models.nn.attention import KeyValue, self_attend
from stare_jax.models.nn.linear import Execution, Linear, scan_layers
from stare_jax.models.nn.norms import layer_norm
from stare_jax.models.nn.placement import constrain_batch
from stare_jax.models.nn.vit import patchify


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the tower."""

    width: Count
    """size of a token of a patch."""
    depth: Count
    """blocks."""
    num_heads: Count
    """attention heads, which divide the width among them."""
    mlp_dim: Count
    """size of the hidden layer of each MLP."""
    patch_size: Count = 14
    """side of a patch in pixels."""

    def __post_init__(self):
        check_fields(self)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of width {self.width}")


class SelfAttention(nn.Module):
    """Bidirectional attention of all patches."""

    config: SigLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        linear = partial(Linear, execution=self.execution)
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        query, key, value = (linear(heads, name=name)(x) for name in ("query", "key", "value"))
        implementation = self.execution.attention
        attended = self_attend(query, KeyValue(key, value), None, is_causal=False, implementation=implementation)
        return linear((cfg.width,), num_in_axes=2, name="out")(attended)


class MLP(nn.Module):
    """Two layers with the tanh form of GELU, as big_vision has it (and OpenVLA's SigLIP has not)."""

    config: SigLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear((self.config.mlp_dim,), self.execution, name="Dense_0")(x)
        return Linear((self.config.width,), self.execution, name="Dense_1")(nn.gelu(hidden, approximate=True))


class EncoderBlock(nn.Module):
    """A pre-norm block: `x += attn(norm(x)); x += mlp(norm(x))`."""

    config: SigLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        attention = SelfAttention(self.config, self.execution, name="MultiHeadDotProductAttention_0")
        x = constrain_batch(x + attention(layer_norm(self.execution, "LayerNorm_0")(x)))
        mlp = MLP(self.config, self.execution, name="MlpBlock_0")
        return constrain_batch(x + mlp(layer_norm(self.execution, "LayerNorm_1")(x))), None


class Encoder(nn.Module):
    """All blocks and the final norm."""

    config: SigLIPConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = scan_layers(EncoderBlock, self.config.depth, self.execution)
        x, _ = blocks(self.config, self.execution, name="encoderblock")(x)
        return layer_norm(self.execution, "encoder_norm")(x)


class SigLIP(nn.Module):
    """Images to tokens of the language model."""

    config: SigLIPConfig
    out_dim: int
    execution: Execution

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps images float32 `[B, H, W, 3]` in [-1, 1] to tokens `[B, patches, out_dim]`."""
        cfg = self.config
        # Pixels and positions are added up in float32, as in openpi.
        embed = Linear((cfg.width,), self.execution, num_in_axes=3, is_exact=True, name="embedding")
        x = constrain_batch(embed(patchify(image, cfg.patch_size)))
        init = nn.initializers.normal(cfg.width**-0.5)
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]), self.execution.param_dtype).astype(jnp.float32)
        x = Encoder(cfg, self.execution, name="Transformer")(x.astype(self.execution.dtype))
        return constrain_batch(Linear((self.out_dim,), self.execution, name="head")(constrain_batch(x)))
