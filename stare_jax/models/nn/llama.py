"""The Llama decoder: RMSNorm, rotary positions (rotate-half), grouped heads, SwiGLU, and a KV cache of static shape."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stare_jax.config import Count, Positive, check_fields
from stare_jax.models.nn.attention import KeyValue, attend, self_attend
from stare_jax.models.nn.linear import Execution, Linear, scan_layers
from stare_jax.models.nn.lora import LoRAConfig, module_adapters
from stare_jax.models.nn.norms import RMSNorm
from stare_jax.models.nn.placement import MANY_TOKENS, constrain_batch, place_token
from stare_jax.models.nn.rotary import rotary_angles, rotate
from stare_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder."""

    vocab_size: Count
    """rows of the embedding table."""
    width: Count
    """size of a token."""
    depth: Count
    """layers."""
    num_heads: Count
    """attention heads, which divide the width among them."""
    num_kv_heads: Count
    """heads of keys and values, a divisor of `num_heads`."""
    mlp_dim: Count
    """size of the hidden layer of each MLP."""
    rope_theta: Positive = 10_000.0
    """base of the rotary wavelengths."""
    norm_eps: Positive = 1e-6
    """1e-6 as in OpenVLA's Hugging Face checkpoints, not Llama 2's 1e-5."""

    def __post_init__(self):
        check_fields(self)
        if self.width % (2 * self.num_heads):
            raise ValueError(f"num_heads: got {self.num_heads}, expected an even share of width {self.width}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class Cache(NamedTuple):
    """Keys and values of the tokens before the next one.

    Every array has a leading axis of layers. Where layers are run one by one (`layout.unstack`), each field is a tuple
    of `KeyValue`, one for every layer, without that axis.
    """

    prefix: KeyValue
    """`[layers, B, P, K, D]`, complete; it is only read."""
    suffix: KeyValue
    """`[layers, B, M, K, D]`, filled from the left as tokens are decoded."""


class LlamaCall(NamedTuple):
    """Arrays of one call that all layers read."""

    cos: jax.Array
    """float32 `[B, T, 1, D/2]`, and `sin` likewise: rotary angles of the new tokens."""
    sin: jax.Array
    masks: tuple[jax.Array | None, ...]
    """bool `[B, T, S]`, one for each segment of keys; None where causality alone decides."""
    index: jax.Array | int = 0
    """slot of the suffix that the new token fills; used in decoding alone."""


class LlamaBlock(nn.Module):
    """One decoder layer."""

    config: LlamaConfig
    execution: Execution
    lora: LoRAConfig | None = None
    path_prefix: str = ""
    """path of this layer, where it is applied by itself; adapters have their size by path."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, call: LlamaCall) -> tuple[jax.Array, KeyValue]:
        """Maps `[B, T, width]` to itself; returns the keys and values of this call, or the cache's updated suffix."""
        cfg, place = self.config, MANY_TOKENS if cache is None else place_token(x)
        linear = partial(Linear, execution=self.execution, use_bias=False, lora=self.lora, path_prefix=self.path_prefix)
        normed = RMSNorm(cfg.norm_eps, self.execution.param_dtype, name="input_norm")(x)
        for_query, for_key, for_value = normed, normed, normed
        if cache is not None:
            # Without the barrier XLA's GPU compiler joins the three products and copies their weights for every token.
            for_query, for_key, for_value = jax.lax.optimization_barrier((normed, normed, normed))
        query = place.sums(linear((cfg.num_heads, cfg.head_dim), name="q_proj")(for_query))
        key = place.sums(linear((cfg.num_kv_heads, cfg.head_dim), name="k_proj")(for_key))
        value = place.sums(linear((cfg.num_kv_heads, cfg.head_dim), name="v_proj")(for_value))
        query, new = rotate(query, call.cos, call.sin), KeyValue(rotate(key, call.cos, call.sin), value)
        if cache is None:
            implementation = self.execution.attention
            attended = self_attend(query, new, *call.masks, is_causal=True, implementation=implementation)
        else:
            new = jax.tree.map(partial(_write, index=call.index), cache.suffix, new)
            attended = attend(query, [cache.prefix, new], call.masks)
        x = place.read(x + linear((cfg.width,), num_in_axes=2, name="o_proj")(place.gathered(attended)))
        normed = RMSNorm(cfg.norm_eps, self.execution.param_dtype, name="post_norm")(x)
        gate = place.sums(linear((cfg.mlp_dim,), name="gate_proj")(normed))
        gated = nn.silu(gate) * place.sums(linear((cfg.mlp_dim,), name="up_proj")(normed))
        return place.read(x + linear((cfg.width,), name="down_proj")(place.gathered(gated))), new


def _write(buffer: jax.Array, new: jax.Array, index: jax.Array | int) -> jax.Array:
    """Writes `[B, 1, K, D]` into slot `index` of `[B, M, K, D]`."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), index, axis=1)


class OutputLayer(nn.Module):
    """The product with a range of columns of the output layer."""

    vocab_size: int
    param_dtype: str
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, hidden: jax.Array, start: int, stop: int) -> jax.Array:
        """Returns float32 logits `[..., stop - start]` of the token ids in [start, stop)."""
        shape = (hidden.shape[-1], self.vocab_size)
        # Small: from scratch, all tokens are about equally likely at first.
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype)
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        logits = product(hidden, kernel[:, start:stop].astype(hidden.dtype))
        if (adapters := module_adapters(self, self.lora, shape[:1], shape[1:])) is not None:
            a, b = adapters.a.astype(hidden.dtype), adapters.b.astype(hidden.dtype)
            logits = logits + adapters.scale * product(hidden @ a, b[:, start:stop])
        return logits


class Llama(nn.Module):
    """Token embedding, layers with the final norm, and output layer: three functions of one set of parameters."""

    config: LlamaConfig
    execution: Execution
    lora: LoRAConfig | None = None

    def setup(self):
        cfg, exe = self.config, self.execution
        normal = nn.initializers.normal
        self.embed_tokens = self.param(
            "embed_tokens", normal(cfg.width**-0.5), (cfg.vocab_size, cfg.width), exe.param_dtype
        )
        self.lm_head = OutputLayer(cfg.vocab_size, exe.param_dtype, self.lora)
        self.layers = scan_layers(LlamaBlock, cfg.depth, exe, num_scanned=1, num_shared=1)(cfg, exe, self.lora)
        self.norm = RMSNorm(cfg.norm_eps, exe.param_dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings `[..., width]` of token ids `[...]`."""
        return constrain_batch(self.embed_tokens[tokens].astype(self.execution.dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, KeyValue]:
        """Runs a whole sequence and returns its hidden states after the final norm; otherwise like `run`."""
        x, kept = self.run(x, mask)
        return self.norm(x), kept

    def run(
        self, x: jax.Array, mask: jax.Array, layers: Sequence[PyTree] | None = None
    ) -> tuple[jax.Array, KeyValue | tuple[KeyValue, ...]]:
        """Runs a whole sequence; padding takes no position, so tokens after it are not affected.

        Args:
            x: `[B, T, width]` embeddings.
            mask: bool `[B, T]`, False on padding; the first token is real. With cuDNN's attention padding comes last.
            layers: parameters from `layout.unstack`, used in place of the stacked ones.

        Returns:
            Hidden states before the final norm `[B, T, width]`; keys and values `[layers, B, T, K, D]`, or of each
            layer.
        """
        positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        allowed = None
        if self.execution.attention == "xla":
            allowed = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)) & mask[:, None]
        return self._run_layers(x, None, LlamaCall(cos, sin, (allowed,)), layers)

    def _run_layers(self, x: jax.Array, cache: Cache | None, call: LlamaCall, layers: Sequence[PyTree] | None):
        if layers is None:
            return self.layers(x, cache, call)
        path_prefix = "/".join((*self.path, "layers"))
        block, kept = LlamaBlock(self.config, self.execution, self.lora, path_prefix, parent=None), []
        for i, params in enumerate(layers):
            layer_cache = None if cache is None else Cache(cache.prefix[i], cache.suffix[i])
            x, new = block.apply({"params": params}, x, layer_cache, call)
            kept.append(new)
        return x, tuple(kept)

    def decode(
        self,
        x: jax.Array,
        cache: Cache,
        mask: jax.Array,
        index: jax.Array | int,
        layers: Sequence[PyTree] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs one more token against a cache.

        Args:
            x: `[B, 1, width]` embedding of the token.
            cache: keys and values of the prefix, and of the `index` tokens decoded since.
            mask: bool `[B, P]` of the prefix, False on padding.
            index: number of tokens decoded before this one, in [0, M).
            layers: as in `run`; the cache is of the same kind.

        Returns:
            Hidden state after the final norm `[B, 1, width]` and the cache with this token in slot `index`.
        """
        positions = mask.sum(axis=1, keepdims=True, dtype=jnp.int32) + index
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        num_slots = jax.tree.leaves(cache.suffix)[0].shape[-3]
        is_decoded = jnp.broadcast_to(jnp.arange(num_slots) <= index, (x.shape[0], 1, num_slots))
        call = LlamaCall(cos, sin, (mask[:, None], is_decoded), index)
        x, suffix = self._run_layers(place_token(x).read(x), cache, call, layers)
        return self.norm(x), cache._replace(suffix=suffix)

    def logits(self, hidden: jax.Array, start: int, stop: int) -> jax.Array:
        """Returns float32 logits `[..., stop - start]` of the token ids in [start, stop)."""
        return self.lm_head(constrain_batch(hidden), start, stop)
