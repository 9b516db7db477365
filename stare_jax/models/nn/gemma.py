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
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from stare_jax.config import Count, check_fields
from stare_jax.models.nn.attention import KeyValue, attend, self_attend
from stare_jax.models.nn.layout import unstack
from stare_jax.models.nn.linear import PRODUCT, Execution, scan_layers
from stare_jax.models.nn.lora import LoRAConfig, low_rank_einsum, stacked_adapters
from stare_jax.models.nn.norms import AdaptiveRMSNorm, OffsetRMSNorm
from stare_jax.models.nn.placement import constrain_batch
from stare_jax.models.nn.rotary import rotary_angles, rotate
from stare_jax.types import PyTree

ROPE_THETA = 10_000.0
QUERY, KEY, GATE = "btd,ndh->btnh", "btd,kdh->btkh", "btd,dm->btm"
"""equations of products with queries' weights, with those of keys or values, and with those of gates or numbers beside
them"""


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one expert; depth and heads are the same for both."""

    width: Count
    """size of a token."""
    depth: Count
    """layers."""
    mlp_dim: Count
    """size of the hidden layer of each MLP."""
    num_heads: Count
    """attention heads."""
    num_kv_heads: Count
    """heads of keys and values, a divisor of `num_heads`."""
    head_dim: Count
    """size of a head, an even number."""

    def __post_init__(self):
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number")


class GemmaCall(NamedTuple):
    """Arrays of one call that all layers read."""

    cos: jax.Array
    """float32 `[B, T, 1, D/2]`, and `sin` likewise: rotary angles of the tokens of this call, expert 0's first."""
    sin: jax.Array
    masks: tuple[jax.Array, ...]
    """bool `[B, T, S]`: of the cache, where there is one, and of the tokens of this call."""
    cond: jax.Array | None
    """`[B, G, width]` condition of expert 1's norms: one for each of G equally long runs of its tokens."""
    lengths: jax.Array | None = None
    """int32 `[B]`, tokens of a call without a cache that all tokens of the row see, where these come first; None where
    masks alone say it."""


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
    """Returns `einsum(equation, x, w)` with a weight of the calling module, plus the product of its adapters.

    Prepared parameters have the weight as its `weight_matrix`.
    """
    w = _weight(module, equation, name, shape, execution)
    y = _multiply(equation, x, w.astype(execution.dtype), shape)
    adapters = stacked_adapters(module, lora, name, shape, path_prefix=module.path_prefix)
    if adapters is not None:
        low_rank = low_rank_einsum(equation, x, adapters.a.astype(x.dtype), adapters.b.astype(x.dtype))
        y = y + adapters.scale * low_rank
    return checkpoint_name(y, PRODUCT)


def stacked_products(
    module: nn.Module,
    equation: str,
    x: jax.Array,
    name: str,
    shape: tuple[int, ...],
    execution: Execution,
    lora: LoRAConfig | None,
) -> tuple[jax.Array, ...]:
    """Returns `product` with each of the weights `shape[1:]` that one weight of the calling module stacks.

    A single product would bring the weights, or the results, into another order: one for each is 1.4 times as fast on
    CPUs, forwards and backwards. Prepared parameters have a tuple of matrices.
    """
    weights, results = _weight(module, equation, name, shape, execution), []
    adapters = stacked_adapters(module, lora, name, shape, path_prefix=module.path_prefix)
    for i in range(shape[0]):
        y = _multiply(equation, x, weights[i].astype(execution.dtype), shape[1:])
        if adapters is not None:
            a, b = (leaf[i].astype(x.dtype) for leaf in (adapters.a, adapters.b))
            y = y + adapters.scale * low_rank_einsum(equation, x, a, b)
        results.append(checkpoint_name(y, PRODUCT))
    return tuple(results)


def weight_matrix(equation: str, w: jax.Array) -> jax.Array:
    """Returns a weight `[*stack, ...]` as matrices `[*stack, in, out]`, the input's axes in the order of x."""
    x_axes, w_axes, y_axes = re.split(",|->", equation)
    num_stacked = w.ndim - len(w_axes)
    order = [num_stacked + w_axes.index(axis) for axis in x_axes[2:] + y_axes[2:]]
    w = w.transpose(*range(num_stacked), *order)
    fan_in = math.prod(w.shape[num_stacked : num_stacked + len(x_axes) - 2])
    return w.reshape(*w.shape[:num_stacked], fan_in, -1)


def _multiply(equation: str, x: jax.Array, w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `einsum(equation, x, w)`; axes of x begin with "bt", and w has a shape, or is a matrix already.

    Rows and tokens are merged, see `Linear`.
    """
    _, w_axes, y_axes = re.split(",|->", equation)
    matrix = weight_matrix(equation, w) if w.shape == shape else w
    y = x.reshape(-1, len(matrix)) @ matrix
    return y.reshape(*x.shape[:2], *(shape[w_axes.index(axis)] for axis in y_axes[2:]))


def _weight(
    module: nn.Module, equation: str, name: str, shape: tuple[int, ...], execution: Execution
) -> jax.Array | tuple[jax.Array, ...]:
    """Returns a weight of the calling module, the last axes of whose shape the equation names, or what is prepared."""
    x_axes, w_axes, _ = re.split(",|->", equation)
    sizes = dict(zip(w_axes[::-1], shape[::-1], strict=False))
    fan_in = math.prod(sizes[axis] for axis in x_axes if axis in sizes)
    stored = module.get_variable("params", name)
    if isinstance(stored, tuple) or (stored is not None and stored.shape == (fan_in, math.prod(shape) // fan_in)):
        return stored
    return module.param(name, nn.initializers.normal(fan_in**-0.5), shape, execution.param_dtype)


class Einsum(nn.Module):
    """A product with a weight `w`, or several with those that it stacks."""

    shape: tuple[int, ...]
    execution: Execution
    lora: LoRAConfig | None = None
    is_stacked: bool = False
    path_prefix: str = ""
    """path of the module that is applied, where this is not the whole model; adapters have their size by path."""

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        multiply = stacked_products if self.is_stacked else product
        return multiply(self, equation, x, "w", self.shape, self.execution, self.lora)


class Attention(nn.Module):
    """Attention among the tokens of both experts, with weights of their own."""

    configs: tuple[GemmaConfig, GemmaConfig]
    execution: Execution
    lora: LoRAConfig | None = None
    path_prefix: str = ""

    @nn.compact
    def __call__(self, xs: Tokens, cache: KeyValue | None, call: GemmaCall) -> tuple[Tokens, KeyValue]:
        """Returns the attention's output for each expert's tokens, and the keys and values of this call, rotated."""
        queries, keys, values = [], [], []
        for i, (x, cfg) in enumerate(zip(xs, self.configs, strict=True)):
            if x is None:
                continue
            q_shape, kv_heads = (cfg.num_heads, cfg.width, cfg.head_dim), cfg.num_kv_heads
            queries.append(self._einsum("q_einsum", i, q_shape)(QUERY, x))
            kv_shape = (2, kv_heads, cfg.width, cfg.head_dim)
            key, value = self._einsum("kv_einsum", i, kv_shape, is_stacked=True)(KEY, x)
            keys.append(key)
            values.append(value)
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in (queries, keys, values))
        new = KeyValue(rotate(key, call.cos, call.sin), value)
        query, segments = rotate(query, call.cos, call.sin), [new] if cache is None else [cache, new]
        if call.lengths is None:
            attended = attend(query, segments, call.masks)
        else:
            of_call = {"implementation": self.execution.attention, "lengths": call.lengths}
            attended = self_attend(query, new, *call.masks, is_causal=False, **of_call)
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

    def _einsum(self, name: str, expert: int, shape: tuple[int, ...], *, is_stacked: bool = False) -> Einsum:
        return Einsum(shape, self.execution, self.lora, is_stacked, self.path_prefix, name=_named(name, expert))


class FeedForward(nn.Module):
    """`(gelu(x W_0) ⊙ x W_1) W`, with the tanh form of GELU."""

    config: GemmaConfig
    execution: Execution
    lora: LoRAConfig | None = None
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, mlp_dim, rest = self.config.width, self.config.mlp_dim, (self.execution, self.lora)
        gate, up = stacked_products(self, GATE, x, "gating_einsum", (2, width, mlp_dim), *rest)
        hidden = nn.gelu(gate, approximate=True) * up
        return product(self, "btm,md->btd", hidden, "linear", (mlp_dim, width), *rest)


class GemmaBlock(nn.Module):
    """One layer of both experts."""

    configs: tuple[GemmaConfig, GemmaConfig]
    execution: Execution
    lora: LoRAConfig | None = None
    path_prefix: str = ""

    @nn.compact
    def __call__(self, xs: Tokens, cache: KeyValue | None, call: GemmaCall) -> tuple[Tokens, KeyValue]:
        rest = (self.execution, self.lora, self.path_prefix)
        normed, gates = self._norm("pre_attention_norm", xs, call.cond)
        attended, new = Attention(self.configs, *rest, name="attn")(normed, cache, call)
        xs = _add(xs, attended, gates)
        normed, gates = self._norm("pre_ffw_norm", xs, call.cond)
        fed = tuple(
            None if x is None else FeedForward(cfg, *rest, name=_named("mlp", i))(x)
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
        lengths: jax.Array | None = None,
        cond: jax.Array | None = None,
        cache: KeyValue | Sequence[KeyValue] | None = None,
        layers: Sequence[PyTree] | None = None,
    ) -> tuple[Tokens, KeyValue | None]:
        """Runs all layers.

        Args:
            xs: embeddings of each expert's tokens.
            positions: int32 `[B, T]` of all tokens of this call, expert 0's first.
            masks: bool `[B, T, S]`: of the cache, where there is one, and of the tokens of this call.
            lengths: int32 `[B]`, see `GemmaCall`; without them `execution.attention` is "xla" in any case.
            cond: `[B, G, width]` condition of expert 1, see `GemmaCall`; required where it has tokens.
            cache: keys and values `[layers, B, P, K, D]` of an earlier call, which the tokens attend to as well; with
                `layers` those of each layer.
            layers: parameters of expert 1 from `unstack_expert`, used in place of the stacked ones where it alone has
                tokens, with a cache.

        Returns:
            Hidden states after the final norms, and the keys and values `[layers, B, T, K, D]` of this call, None with
            `layers`.
        """
        cos, sin = rotary_angles(positions, self.configs[0].head_dim, ROPE_THETA)
        call, new = GemmaCall(cos, sin, tuple(masks), cond, lengths), None
        if layers is None:
            xs, new = self.layers(xs, cache, call)
        else:
            path_prefix = "/".join((*self.path, "layers"))
            block = GemmaBlock(self.configs, self.execution, self.lora, path_prefix, parent=None)
            for params, layer_cache in zip(layers, cache, strict=True):
                xs, _ = block.apply({"params": params}, xs, layer_cache, call)
        first = None if xs[0] is None else self.final_norm(xs[0])
        second = None if xs[1] is None else self.final_norm_1(xs[1], cond)[0]
        return (first, second), new


def unstack_expert(layers: PyTree, depth: int) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Returns the stacked parameters of PaliGemma alone, and the action expert's of each layer.

    The expert reads few tokens many times, so that its time is that of reading its weights; PaliGemma reads many once.
    As all weights are copied, they become the matrices that products read.

    Args:
        layers: parameters of the stack of `GemmaBlock`.
        depth: number of layers.
    """
    flat = flatten_dict(layers)
    own = {path: leaf for path, leaf in flat.items() if any(name.endswith("_1") for name in path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in own}
    query, key_value, gates = ("attn", "q_einsum_1", "w"), ("attn", "kv_einsum_1", "w"), ("mlp_1", "gating_einsum")
    own[query] = weight_matrix(QUERY, own[query])
    for path, equation in ((key_value, KEY), (gates, GATE)):
        matrices = weight_matrix(equation, own[path])
        own[path] = (matrices[:, 0], matrices[:, 1])
    return unflatten_dict(rest), unstack(unflatten_dict(own), depth)
