"""Parts of all transformer stacks: their execution, a linear layer, a scan over layers."""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stare_jax.config import Count, check_fields
from stare_jax.models.nn.attention import AttentionKernel
from stare_jax.models.nn.lora import LoRAConfig, module_adapters

PRODUCT = "product"
"""name of the results of products, for rematerialisation."""
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name, as the kernel's and the adapters' products would be kept apart, although their sum is all that is used.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


Float = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Numerical types, memory and kernels of a stack of layers; the function that it computes is the same."""

    dtype: Float = "float32"
    """type of activations and matrix products."""
    param_dtype: Float = "float32"
    """type of the parameters; adapters and value head are float32 in any case."""
    remat: Literal["none", "full", "dots"] = "none"
    """rematerialisation: "full" computes every layer again in the backward pass, "dots" keeps the products' results."""
    unroll: Count = 1
    """layers per iteration of the scan over layers."""
    attention: AttentionKernel = "xla"
    """implementation of attention over whole sequences, as far as their masks allow another than "xla"."""

    def __post_init__(self):
        check_fields(self)
        if self.attention == "cudnn" and self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype: got {self.dtype!r}, expected 'bfloat16' or 'float16' for attention = 'cudnn'")


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU x Φ(x), computed in float32 by erf, which CPUs do faster than `jax.nn.gelu`'s erfc."""
    x32 = x.astype(jnp.float32)
    return (x32 * (0.5 + 0.5 * jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


class Linear(nn.Module):
    """`y = x W + b` over the last `num_in_axes` axes of x; the kernel keeps its axes, such as heads, apart.

    All other axes are merged first: the weight gradient of one large product is twice as fast on CPUs as that of a
    product with several batch axes.
    """

    features: tuple[int, ...]
    execution: Execution
    num_in_axes: int = 1
    use_bias: bool = True
    is_exact: bool = False
    """True multiplies in float32 on every device, whatever `execution.dtype` is."""
    lora: LoRAConfig | None = None
    """adapters of the model; the path of this product decides whether it has some, and their size."""
    path_prefix: str = ""
    """path of the module that is applied, where this is not the whole model."""

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
        dtype = "float32" if self.is_exact else self.execution.dtype
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
        x = x.reshape(-1, fan_in)
        # By default, accelerators multiply float32 numbers with the precision of bfloat16 or TF32.
        precision = jax.lax.Precision.HIGHEST if self.is_exact else None
        y = jnp.matmul(x, kernel.reshape(fan_in, fan_out), precision=precision)
        adapters = module_adapters(self, self.lora, in_shape, self.features, path_prefix=self.path_prefix)
        if adapters is not None:
            a, b = adapters.a.astype(x.dtype), adapters.b.astype(x.dtype)
            # Scaled where there are `rank` numbers a row, and added by the product itself where the compiler can.
            narrow = adapters.scale * jnp.matmul(x, a.reshape(fan_in, -1), precision=precision)
            y = y + jnp.matmul(narrow, b.reshape(-1, fan_out), precision=precision)
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
        num_scanned: number of arguments with a leading axis of layers.
        num_shared: number of arguments, after those, that every layer gets unchanged.
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
