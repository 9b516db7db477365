"""Softmax attention over one or more segments of keys, in float32 where it matters."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValue(NamedTuple):
    """Keys and values of one segment of the sequence, both `[B, S, K, D]`: K key-value heads of width D."""

    key: jax.Array
    value: jax.Array


def attend(query: jax.Array, segments: Sequence[KeyValue], masks: Sequence[jax.Array | None]) -> jax.Array:
    """Returns softmax(q kᵀ / √D) v, the softmax running over all segments together.

    Segments spare the copy of a long, finished prefix that a single cache would need for every new token.

    Args:
        query: `[B, T, H, D]`; H is a multiple of the K key-value heads, consecutive heads share one.
        segments: `[B, S_i, K, D]` each.
        masks: bool `[B, T, S_i]` each, True where attention is allowed; None allows all. No row may be all False.

    Returns:
        `[B, T, H, D]` in the dtype of the values.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = segments[0].key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = []
    for segment, mask in zip(segments, masks, strict=True):
        score = jnp.einsum("btkgd,bskd->bkgts", grouped, segment.key, preferred_element_type=jnp.float32)
        scores.append(score if mask is None else jnp.where(mask[:, None, None], score, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(segments[0].value.dtype)
    out, start = 0.0, 0
    for segment in segments:
        stop = start + segment.key.shape[1]
        out += jnp.einsum("bkgts,bskd->btkgd", weights[..., start:stop], segment.value)
        start = stop
    return out.reshape(batch, length, num_heads, head_dim)
