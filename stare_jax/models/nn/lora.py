"""Low-rank adapters (LoRA, arXiv:2106.09685): `y = x W + (alpha / rank) (x A) B` beside a frozen W.

They are leaves of the parameter tree beside the kernel that they adapt, `lora_a` with the kernel's input axes and
`lora_b` with its output axes, and are applied where they are: the tree without them is the base model.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from stare_jax.types import PyTree

ALL_LINEAR = (r"^(dino|siglip|projector|llm)/",)
"""what PEFT makes of "all-linear" for OpenVLA: every product, the output layer and both patch embeddings among them."""
ATTENTION = (r"^llm/layers/[qv]_proj$",)
"""PEFT's own choice for Llama: queries and values of the decoder."""
BASE_PATTERN = r"^(?!value)(?!.*lora_[ab]$)"
"""regex of the parameters that adapters leave frozen: all but themselves and the value head."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which products have adapters, and how large these are; alpha is 16 in OpenVLA and RL4VLA, the rank in RLinf."""

    rank: int = 32
    alpha: float = 16.0
    targets: tuple[str, ...] = ALL_LINEAR
    """regexes of module paths such as `llm/layers/q_proj`, `dino/patch_embed`, `llm/lm_head`."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, expected >= 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha: got {self.alpha}, expected > 0")
        if not self.targets:
            raise ValueError("targets: got none, expected at least one regex")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Returns whether the module at a path of names with slashes between has adapters."""
        return any(re.search(pattern, path) for pattern in self.targets)


def module_adapters(
    module: nn.Module, config: LoRAConfig | None, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the adapters float32 `[*in, rank]` and `[rank, *out]` of a module; None where its parameters have none.

    They are created, as parameters, when the module is initialised: A normal with deviation 1 / rank, B zero.

    Raises:
        ValueError: there are adapters and no config that says how much they count.
    """
    rank = config.rank if config is not None else 0
    return _adapters(module, config, "", (*in_shape, rank), (rank, *out_shape))


def stacked_adapters(
    module: nn.Module, config: LoRAConfig | None, name: str, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the adapters `[..., in, rank]` and `[..., rank, out]` of one weight `[..., in, out]` of a module.

    They are adapters of each matrix in the stack, as openpi has them, and carry its names: `lora_a` beside a weight
    called `w`, and `<name>_lora_a` beside others. Otherwise as `module_adapters`.
    """
    rank = config.rank if config is not None else 0
    prefix = "" if name == "w" else f"{name}_"
    return _adapters(module, config, prefix, (*shape[:-1], rank), (*shape[:-2], rank, shape[-1]))


def _adapters(
    module: nn.Module, config: LoRAConfig | None, prefix: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array] | None:
    path = "/".join((*module.path, prefix.rstrip("_"))).rstrip("/")
    if module.is_initializing():
        has_adapters = config is not None and config.adapts(path)
    else:
        has_adapters = module.has_variable("params", f"{prefix}lora_a")
    if not has_adapters:
        return None
    if config is None:
        raise ValueError(f"lora: got None, expected the LoRAConfig of the adapters at {path}")
    a = module.param(f"{prefix}lora_a", nn.initializers.normal(1 / config.rank), a_shape)
    b = module.param(f"{prefix}lora_b", nn.initializers.zeros, b_shape)
    return a, b


def low_rank_einsum(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `einsum(equation, x, a @ b)` without the product of the adapters.

    Args:
        equation: of x and a weight `[..., in, out]`, such as "btd,ndh->btnh"; "r" is not among its axes.
        x: the input.
        a: `[..., in, rank]`.
        b: `[..., rank, out]`.
    """
    x_axes, w_axes, y_axes = re.split(",|->", equation)
    low = "".join(dict.fromkeys(x_axes + w_axes[:-2])).replace(w_axes[-2], "") + "r"
    narrow = jnp.einsum(f"{x_axes},{w_axes[:-1]}r->{low}", x, a)
    return jnp.einsum(f"{low},{w_axes[:-2]}r{w_axes[-1]}->{y_axes}", narrow, b)


def drop_adapters(params: PyTree) -> PyTree:
    """Returns the parameters of the base model, the same arrays."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if not _is_adapter(path)})


def keep_adapters(params: PyTree) -> PyTree:
    """Returns the adapters alone, the same arrays."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if _is_adapter(path)})


def add_adapters(params: PyTree, adapters: PyTree) -> PyTree:
    """Returns parameters with the adapters of another tree in place of their own."""
    return unflatten_dict(flatten_dict(drop_adapters(params)) | flatten_dict(keep_adapters(adapters)))


def init_adapters(init: Callable[[jax.Array], PyTree], key: jax.Array, *, out_shardings: PyTree = None) -> PyTree:
    """Returns fresh adapters, without allocating the rest of the model.

    Args:
        init: `Policy.init` of a model with adapters.
        key: consumed.
        out_shardings: of the adapters, where they are not to be on one device.
    """
    # What is not returned is not computed.
    return jax.jit(lambda key: keep_adapters(init(key)), out_shardings=out_shardings)(key)


def store_frozen(params: PyTree, patterns: Sequence[str], dtype: str) -> PyTree:
    """Returns parameters with those that one of the regexes matches in another type."""

    def store(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.astype(dtype) if any(re.search(pattern, name) for pattern in patterns) else leaf

    return jax.tree.map_with_path(store, params)


def merge_adapters(params: PyTree, config: LoRAConfig) -> PyTree:
    """Returns parameters of the base model that compute what `params` do: `W + (alpha / rank) A B`.

    The sum is taken in float32 and rounded to the kernel's type once.
    """
    merged = dict(flatten_dict(params))
    for path in [path for path in merged if path[-1].endswith("lora_a")]:
        *module, name = path
        a, b = merged.pop(path), merged.pop((*module, f"{name[:-1]}b"))
        stem = name.removesuffix("lora_a").rstrip("_")
        target = next(
            key for key in ((*module, leaf) for leaf in ((stem,) if stem else ("kernel", "w"))) if key in merged
        )
        kernel = merged[target]
        a, b = (jnp.asarray(adapter, jnp.float32) for adapter in (a, b))
        if target[-1] == "kernel":
            num_stacked = a.ndim + b.ndim - kernel.ndim - 2
            stacked, in_shape, out_shape = (
                kernel.shape[:num_stacked],
                a.shape[num_stacked:-1],
                b.shape[num_stacked + 1 :],
            )
            a = a.reshape(*stacked, math.prod(in_shape), config.rank)
            b = b.reshape(*stacked, config.rank, math.prod(out_shape))
        delta = config.scale * jnp.matmul(a, b, precision="highest").reshape(kernel.shape)
        merged[target] = (jnp.asarray(kernel, jnp.float32) + delta).astype(kernel.dtype)
    return unflatten_dict(merged)


def _is_adapter(path: tuple[str, ...]) -> bool:
    return path[-1].endswith(("lora_a", "lora_b"))
