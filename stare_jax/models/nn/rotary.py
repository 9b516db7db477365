"""Rotary positions in the rotate-half convention."""

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of `position · theta^(-2i/D)`, float32 `[B, T, 1, D/2]`.

    Args:
        positions: int32 `[B, T]`.
        head_dim: D, even.
        theta: base of the frequencies.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `[B, T, H, D]` in the rotate-half convention, pairing dimension i with i + D/2.

    Args:
        x: queries or keys.
        cos: float32 `[B, T, 1, D/2]`, and `sin` likewise.
    """
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    # Rounded before they are joined: no whole head is written in float32.
    halves = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)
