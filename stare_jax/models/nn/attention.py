"""Softmax attention over one or more segments of keys; scores and softmax are float32."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

AttentionKernel = Literal["xla", "cudnn"]
"""implementations of attention over whole sequences, see `self_attend`; cuDNN's needs 16 bits and an NVIDIA GPU, one of
the Hopper generation or later for heads wider than 128, as those of PaliGemma"""


class KeyValue(NamedTuple):
    """Keys and values of one segment of the sequence, both `[B, S, K, D]`: K key-value heads of width D."""

    key: jax.Array
    value: jax.Array


def self_attend(
    query: jax.Array,
    new: KeyValue,
    mask: jax.Array | None,
    *,
    is_causal: bool,
    implementation: AttentionKernel,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Returns the attention `[B, T, H, D]` of a whole sequence to itself.

    Args:
        query: `[B, T, H, D]`.
        new: `[B, T, K, D]` each.
        mask: for "xla", as in `attend`, causality included. "cudnn" knows causality and `lengths` alone: padding has to
            come last, where causality hides it from the tokens before it, or `lengths` from all.
        is_causal: whether tokens see only those before them.
        implementation: "xla", or "cudnn", which stores no matrix of scores and computes no scores that causality hides;
            where the program is traced without a GPU, JAX's own attention stands in for cuDNN's.
        lengths: for "cudnn", int32 `[B]` in [1, T], the tokens of each row that are no padding; None where causality
            hides it, or there is none. Padding itself attends to them: finite, and for nobody to read.
    """
    if implementation == "xla":
        return attend(query, [new], [mask])
    batch, length = query.shape[:2]
    padding = length % 2  # JAX refuses cuDNN's backward pass of an odd number of tokens.
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, *new))
    if lengths is None and padding and not is_causal:
        lengths = jnp.full(batch, length, jnp.int32)
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        is_causal=is_causal,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    return attended[:, :length]


def attend(query: jax.Array, segments: Sequence[KeyValue], masks: Sequence[jax.Array | None]) -> jax.Array:
    """Returns softmax(q kᵀ / √D) v, the softmax running over all segments together.

    Segments spare the copy of a long, finished prefix that a single cache would need for every new token.

    Args:
        query: `[B, T, H, D]`; H is a multiple of the K key-value heads, consecutive heads share one.
        segments: `[B, S_i, K, D]` each.
        masks: bool `[B, T, S_i]` each, True where attention is allowed; None allows all. A row that is False
            everywhere, of a token that is padding itself, takes the mean of all values: finite, and for nobody to read.

    Returns:
        `[B, T, H, D]` in the dtype of the values.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = segments[0].key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # Products write and read the scores of a whole sequence in order if queries and results, which are smaller, are
    # brought into that order. Few queries after a cache gain nothing by it, nor do heads with keys of their own.
    is_ordered = len(segments) == 1 and num_kv_heads < num_heads
    axes = "bkgtd" if is_ordered else "btkgd"
    if is_ordered:
        grouped = grouped.transpose(0, 2, 3, 1, 4)
    scores = []
    for segment, mask in zip(segments, masks, strict=True):
        score = jnp.einsum(f"{axes},bskd->bkgts", grouped, segment.key, preferred_element_type=jnp.float32)
        score = score * head_dim**-0.5  # in float32; a query of 16 bits that is scaled before is rounded once more
        scores.append(score if mask is None else jnp.where(mask[:, None, None], score, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(segments[0].value.dtype)
    out, start = 0.0, 0
    for segment in segments:
        stop = start + segment.key.shape[1]
        out += jnp.einsum(f"bkgts,bskd->{axes}", weights[..., start:stop], segment.value)
        start = stop
    if is_ordered:
        out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, num_heads, head_dim)
