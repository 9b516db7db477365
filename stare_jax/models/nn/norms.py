"""Norms of tokens, all computed in float32: LayerNorm, and RMSNorm in three forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.placement import constrain_batch

NORM_EPS = 1e-6
"""epsilon of all norms of pi0.5 and of the vision towers."""


def layer_norm(execution: Execution, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm that computes its variance in two passes, as the towers' original code does."""
    return nn.LayerNorm(
        NORM_EPS,
        use_fast_variance=False,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        name=name,
    )


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps)`, cast back to the type of x, times the scale: Llama's order."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return _divide_by_rms(x, self.eps).astype(x.dtype) * scale.astype(x.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm with the scale applied as 1 + w in float32: Gemma's."""

    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.execution.param_dtype)
        return (_divide_by_rms(x, NORM_EPS) * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm with a scale and a shift that follow from a condition, and a gate for the branch behind it (adaRMS).

    The condition's layer starts at zero, and the gate with it: every branch adds nothing at first.
    """

    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalises tokens.

        Args:
            x: `[B, T, D]` tokens, G runs of T / G tokens each.
            cond: `[B, G, E]` the condition of every run.

        Returns:
            The normalised tokens `[B, T, D]`, and their gates: `[B, T, D]`, or `[B, 1, D]` where G is 1.
        """
        dense = nn.Dense(
            3 * x.shape[-1],
            kernel_init=nn.initializers.zeros,
            dtype=self.execution.dtype,
            param_dtype=self.execution.param_dtype,
            name="Dense_0",
        )
        modulation, num_runs = constrain_batch(dense(constrain_batch(cond))), cond.shape[1]
        if num_runs > 1:
            modulation = jnp.repeat(modulation, x.shape[1] // num_runs, axis=1)
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        normed = _divide_by_rms(x, NORM_EPS) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return normed.astype(x.dtype), gate


def _divide_by_rms(x: jax.Array, eps: float) -> jax.Array:
    """Returns float32 `x / sqrt(mean(x²) + eps)`, the mean over the last axis."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
