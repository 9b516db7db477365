"""Gemma with two experts: tokens of two kinds, each with weights of its own, that attend to one another.

Expert 0 is PaliGemma's language model and reads images and text; expert 1, smaller, reads noisy actions, its norms
modulated by the flow time. Parameter names and shapes are those of openpi's checkpoints.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stare_jax.config import Count, check_fields
from stare_jax.models.nn.attention import KeyValue, attend
from stare_jax.models.nn.linear import PRODUCT, Execution, scan_layers
from stare_jax.models.nn.lora import LoRAConfig, low_rank_einsum, stacked_adapters
from stare_jax.models.nn.norms import AdaptiveRMSNorm, OffsetRMSNorm
from stare_jax.models.nn.placement import constrain_batch
from stare_jax.models.nn.rotary import rotary_angles, rotate

ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one expert; depth and heads are the same for both."""

    width: Count
    depth: Count
    mlp_dim: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count

    def __post_init__(self):
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number")


class GemmaCall(NamedTuple):
    """Arrays of one call that all layers read."""

    cos: jax.Array
    """float32 `[B, T, 1, D]`, and `sin` likewise: rotary angles of the tokens of this call, expert 0's first."""
    sin: jax.Array
    masks: tuple[jax.Array, ...]
    """bool `[B, T, S]`: of the cache, where there is one, and of the tokens of this call."""
    cond: jax.Array | None
    """`[B, G, width]` condition of expert 1's norms: one for each of G equally long runs of its tokens."""


Tokens = tuple[jax.Array | None, jax.Array | None]
"""Tokens `[B, T_i, width_i]` of each expert; None where a call has none of the kind."""


def product(
    module: nn.Module,
    equation: str,
    x: jax.Array,
    name: str,
    shape: tuple[int, ...],
    execution: Execution,
    lora: LoRAConfig | None,
) -> jax.Array:
    """Returns `einsum(equation, x, w)` with a weight of the calling module, plus the product of its adapters."""
    x_axes, w_axes, _ = re.split(",|->", equation)
    fan_in = math.prod(size for size, axis in zip(shape, w_axes, strict=True) if axis in x_axes)
    w = module.param(name, nn.initializers.normal(fan_in**-0.5), shape, execution.param_dtype)
    y = jnp.einsum(equation, x, w.astype(execution.dtype))
    if (adapters := stacked_adapters(module, lora, name, shape)) is not None:
        low_rank = low_rank_einsum(equation, x, adapters.a.astype(x.dtype), adapters.b.astype(x.dtype))
        y = y + adapters.scale * low_rank
    return checkpoint_name(y, PRODUCT)


class Einsum(nn.Module):
    """A product with one weight `w`."""

    shape: tuple[int, ...]
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        return product(self, equation, x, "w", self.shape, self.execution, self.lora)


class Attention(nn.Module):
    """Attention among the tokens of both experts, with weights of their own."""

    configs: tuple[GemmaConfig, GemmaConfig]
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, xs: Tokens, cache: KeyValue | None, call: GemmaCall) -> tuple[Tokens, KeyValue]:
        """Returns the attention's output for each expert's tokens, and the keys and values of this call, rotated."""
        queries, keys, values = [], [], []
        for i, (x, cfg) in enumerate(zip(xs, self.configs, strict=True)):
            if x is None:
                continue
            q_shape, kv_heads = (cfg.num_heads, cfg.width, cfg.head_dim), cfg.num_kv_heads
            queries.append(self._einsum("q_einsum", i, q_shape)("btd,ndh->btnh", x))
            kv_shape = (2, kv_heads, cfg.width, cfg.head_dim)
            key, value = self._einsum("kv_einsum", i, kv_shape)("btd,ckdh->cbtkh", x)
            keys.append(key)
            values.append(value)
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in (queries, keys, values))
        new = KeyValue(rotate(key, call.cos, call.sin), value)
        segments = [new] if cache is None else [cache, new]
        attended = attend(rotate(query, call.cos, call.sin), segments, call.masks)
        outputs, start = [], 0
        for i, (x, cfg) in enumerate(zip(xs, self.configs, strict=True)):
            if x is None:
                outputs.append(None)
                continue
            part = attended[:, start : start + x.shape[1]]
            shape = (cfg.num_heads, cfg.head_dim, cfg.width)
            outputs.append(self._einsum("attn_vec_einsum", i, shape)("btnh,nhd->btd", part))
            start += x.shape[1]
        return tuple(outputs), new

    def _einsum(self, name: str, expert: int, shape: tuple[int, ...]) -> Einsum:
        return Einsum(shape, self.execution, self.lora, name=_named(name, expert))


class FeedForward(nn.Module):
    """`(gelu(x W_0) ⊙ x W_1) W`, with the tanh form of GELU."""

    config: GemmaConfig
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, mlp_dim, rest = self.config.width, self.config.mlp_dim, (self.execution, self.lora)
        gate, up = product(self, "btd,cdm->cbtm", x, "gating_einsum", (2, width, mlp_dim), *rest)
        hidden = nn.gelu(gate, approximate=True) * up
        return product(self, "btm,md->btd", hidden, "linear", (mlp_dim, width), *rest)


class GemmaBlock(nn.Module):
    """One layer of both experts."""

    configs: tuple[GemmaConfig, GemmaConfig]
    execution: Execution
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, xs: Tokens, cache: KeyValue | None, call: GemmaCall) -> tuple[Tokens, KeyValue]:
        normed, gates = self._norm("pre_attention_norm", xs, call.cond)
        attended, new = Attention(self.configs, self.execution, self.lora, name="attn")(normed, cache, call)
        xs = _add(xs, attended, gates)
        normed, gates = self._norm("pre_ffw_norm", xs, call.cond)
        fed = tuple(
            None if x is None else FeedForward(cfg, self.execution, self.lora, name=_named("mlp", i))(x)
            for i, (x, cfg) in enumerate(zip(normed, self.configs, strict=True))
        )
        return _add(xs, fed, gates), new

    def _norm(self, name: str, xs: Tokens, cond: jax.Array | None) -> tuple[Tokens, Tokens]:
        return norm_experts(name, xs, cond, self.execution)


def norm_experts(name: str, xs: Tokens, cond: jax.Array | None, execution: Execution) -> tuple[Tokens, Tokens]:
    """Normalises the tokens of each expert within the calling module; returns them and the gates of their branches."""
    normed, gates = (None, None), (None, None)
    if xs[0] is not None:
        y = OffsetRMSNorm(execution, name=name)(xs[0])
        normed = (y, None)
    if xs[1] is not None:
        y, gate = AdaptiveRMSNorm(execution, name=_named(name, 1))(xs[1], cond)
        normed, gates = (normed[0], y), (None, gate)
    return normed, gates


def _add(xs: Tokens, branches: Tokens, gates: Tokens) -> Tokens:
    """Returns `x + branch`, or `x + branch · gate`, for each expert."""

    def one(x, branch, gate):
        return None if x is None else constrain_batch(x + (branch if gate is None else branch * gate))

    return tuple(one(*parts) for parts in zip(xs, branches, gates, strict=True))


def _named(name: str, expert: int) -> str:
    return name if expert == 0 else f"{name}_{expert}"


class Embedder(nn.Module):
    """The table of token embeddings."""

    vocab_size: int
    width: int
    execution: Execution

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns `[..., width]`, multiplied by the root of the width, for token ids `[...]`."""
        shape = (self.vocab_size, self.width)
        table = self.param("input_embedding", nn.initializers.normal(0.01), shape, self.execution.param_dtype)
        rows = table[tokens].astype(self.execution.dtype)
        return rows * jnp.asarray(math.sqrt(self.width), rows.dtype)


class Gemma(nn.Module):
    """Token embedding and the layers of both experts with their final norms."""

    configs: tuple[GemmaConfig, GemmaConfig]
    vocab_size: int
    execution: Execution
    lora: LoRAConfig | None = None

    def setup(self):
        cfg, exe = self.configs[0], self.execution
        self.embedder = Embedder(self.vocab_size, cfg.width, exe)
        layers = scan_layers(GemmaBlock, cfg.depth, exe, num_scanned=1, num_shared=1)
        self.layers = layers(self.configs, exe, self.lora)
        self.final_norm = OffsetRMSNorm(exe)
        self.final_norm_1 = AdaptiveRMSNorm(exe)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings `[..., width]` of token ids `[...]`."""
        return self.embedder(tokens)

    def __call__(
        self,
        xs: Tokens,
        positions: jax.Array,
        masks: Sequence[jax.Array],
        *,
        cond: jax.Array | None = None,
        cache: KeyValue | None = None,
    ) -> tuple[Tokens, KeyValue]:
        """Runs all layers.

        Args:
            xs: embeddings of each expert's tokens.
            positions: int32 `[B, T]` of all tokens of this call, expert 0's first.
            masks: bool `[B, T, S]`: of the cache, where there is one, and of the tokens of this call.
            cond: `[B, G, width]` condition of expert 1, see `GemmaCall`; required where it has tokens.
            cache: keys and values `[layers, B, P, K, D]` of an earlier call, which the tokens attend to as well.

        Returns:
            Hidden states after the final norms, and the keys and values `[layers, B, T, K, D]` of this call.
        """
        cos, sin = rotary_angles(positions, self.configs[0].head_dim, ROPE_THETA)
        xs, new = self.layers(xs, cache, GemmaCall(cos, sin, tuple(masks), cond))
        first = None if xs[0] is None else self.final_norm(xs[0])
        second = None if xs[1] is None else self.final_norm_1(xs[1], cond)[0]
        return (first, second), new
