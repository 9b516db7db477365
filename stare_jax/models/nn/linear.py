"""What all transformer stacks here are made of: how they are computed, a linear layer, a scan over layers."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax.models.nn.lora import LoRAConfig, module_adapters
from stare_jax.sharding.mesh import BATCH_AXES

PRODUCT = "product"
"""name of what `Linear` computes, for rematerialisation."""
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name, as the kernel's and the adapters' products would be kept apart, although their sum is all that is used.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a stack of layers is computed, apart from what it computes."""

    dtype: str = "float32"
    """of activations and matrix products."""
    param_dtype: str = "float32"
    """of the parameters, adapters and value head apart, which are float32."""
    remat: str = "none"
    """"none", "full" (recompute every layer in the backward pass) or "dots" (keep what linear layers compute)."""
    unroll: int = 1
    """layers per iteration of the scan over layers."""
    attention: str = "xla"
    """over whole sequences: "xla", or "cudnn", which needs an NVIDIA GPU and 16 bits; see `attention.self_attend`."""

    def __post_init__(self):
        if self.remat not in ("none", *REMAT_POLICIES):
            raise ValueError(f"remat: got {self.remat!r}, expected one of {('none', *REMAT_POLICIES)}")
        if self.unroll < 1:
            raise ValueError(f"unroll: got {self.unroll}, expected at least 1")
        if self.attention not in ("xla", "cudnn"):
            raise ValueError(f"attention: got {self.attention!r}, expected 'xla' or 'cudnn'")
        if self.attention == "cudnn" and self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype: got {self.dtype!r}, expected 'bfloat16' or 'float16' for attention = 'cudnn'")


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU x Φ(x), computed in float32 by erf, which CPUs do faster than `jax.nn.gelu`'s erfc."""
    x32 = x.astype(jnp.float32)
    return (x32 * (0.5 + 0.5 * jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def split_batch(x: jax.Array) -> jax.Array:
    """Keeps the rows `[B, ...]` of activations split over the mesh on which parameters lie, where it divides them.

    Left to itself, the compiler would rather split activations as it finds weights split, by width, and exchange
    activations of the whole batch in every layer instead of gathering the layer's weights. Gradients are kept split
    where the activations are: what goes into a product whose weights are split by its input has to be split here, or
    its gradient is not. On one device this is nothing.
    """
    mesh = jax.typeof(x).sharding.mesh  # every value knows it, wherever it is traced
    if mesh.size <= 1 or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))


class Linear(nn.Module):
    """`y = x W + b` over the last `num_in_axes` axes of x; the kernel keeps its axes, such as heads, apart.

    All other axes are merged first: one large matrix product, whose weight gradient is twice as fast on CPUs as that of
    a product with several batch axes.
    """

    features: tuple[int, ...]
    execution: Execution
    num_in_axes: int = 1
    use_bias: bool = True
    lora: LoRAConfig | None = None
    """of the model; whether this product has adapters follows from its path."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., *in]` to `[..., *features]`."""
        batch_shape, in_shape = x.shape[: -self.num_in_axes], x.shape[-self.num_in_axes :]
        fan_in, fan_out = math.prod(in_shape), math.prod(self.features)
        init = nn.initializers.normal(fan_in**-0.5)
        kernel = self.param("kernel", init, (*in_shape, *self.features), self.execution.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.execution.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.execution.dtype)
        x = x.reshape(-1, fan_in)
        y = x @ kernel.reshape(fan_in, fan_out)
        if (adapters := module_adapters(self, self.lora, in_shape, self.features)) is not None:
            a, b = (adapter.astype(x.dtype) for adapter in adapters)
            # Scaled where there are `rank` numbers a row, and added by the product itself where the compiler can.
            y = y + (self.lora.scale * (x @ a.reshape(fan_in, -1))) @ b.reshape(-1, fan_out)
        y = checkpoint_name(y, PRODUCT)
        if bias is not None:
            y = y + bias.reshape(-1)
        return y.reshape(*batch_shape, *self.features)


def scan_layers(
    block: type[nn.Module], depth: int, execution: Execution, *, num_scanned: int = 0, num_shared: int = 0
) -> Any:
    """Returns a module class that applies `block` `depth` times, its parameters stacked on a leading axis.

    Args:
        block: module class whose call maps (carry, *scanned, *shared) to (carry, output).
        depth: number of layers.
        execution: unrolling and rematerialisation.
        num_scanned: how many arguments have a leading axis of layers.
        num_shared: how many arguments, after those, every layer gets as they are.
    """
    if execution.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[execution.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0,) * num_scanned + (nn.broadcast,) * num_shared,
        length=depth,
        unroll=min(execution.unroll, depth),
    )
