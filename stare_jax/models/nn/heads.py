"""Small networks behind the large ones: the critic's value and the deviation of Flow-Noise, both in float32."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

exact_dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
"""a layer whose products are those of float32 on every device."""


class ValueHead(nn.Module):
    """An MLP with exact GELU that ends in one number without bias, as RL4VLA's value head; float32 throughout."""

    hidden_dims: tuple[int, ...] = (512, 128)

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 `[...]` for features `[..., D]`."""
        x = hidden.astype(jnp.float32)
        for i, dim in enumerate(self.hidden_dims):
            x = nn.gelu(exact_dense(dim, name=f"layer_{i}")(x), approximate=False)
        # A small last layer starts the critic near zero whatever the features are.
        out = exact_dense(1, use_bias=False, kernel_init=nn.initializers.normal(0.02), name="out")(x)
        return out[..., 0]


class NoiseHead(nn.Module):
    """Deviations of Flow-Noise from the expert's hidden states: an MLP with tanh, float32 throughout."""

    out_dim: int
    hidden_dims: tuple[int, ...] = (128, 64)

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns `[..., out_dim]`, see `losses.flow.learned_deviation`, for hidden states `[..., width]`."""
        x = hidden.astype(jnp.float32)
        for i, dim in enumerate(self.hidden_dims):
            x = jnp.tanh(exact_dense(dim, name=f"layer_{i}")(x))
        return exact_dense(self.out_dim, name="out")(x)
