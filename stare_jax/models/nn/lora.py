"""Low-rank adapters (LoRA, arXiv:2106.09685): `y = x W + (alpha / rank) (x A) B` beside a frozen W.

They are leaves of the parameter tree beside the kernel that they adapt, `lora_a` with the kernel's input axes and
`lora_b` with its output axes, and are applied where they are: the tree without them is the base model.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from annotated_types import MinLen
from flax.traverse_util import flatten_dict, unflatten_dict

from stare_jax.config import Count, Pattern, Positive, check_fields
from stare_jax.types import PyTree

ALL_LINEAR = (r"^(dino|siglip|projector|llm)/",)
"""PEFT's "all-linear" for OpenVLA: every product, the output layer and both patch embeddings included."""
ATTENTION = (r"^llm/layers/[qv]_proj$",)
"""PEFT's own choice for Llama: queries and values of the decoder."""
BASE_PATTERN = r"^(?!value)(?!.*lora_[ab]$)"
"""regex of the parameters that adapters leave frozen: all but themselves and the value head."""


@dataclasses.dataclass(frozen=True)
class LoRAOverride:
    """A rank and an alpha of their own for the products whose module path one regex matches."""

    pattern: Pattern
    """regex of module paths."""
    rank: Count
    """rank of their adapters."""
    alpha: Positive
    """numerator of their scale, alpha / rank."""

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Products that have adapters, and the sizes of these; alpha is 16 in OpenVLA and RL4VLA, the rank in RLinf."""

    rank: Count = 32
    """rank of the adapters."""
    alpha: Positive = 16.0
    """numerator of their scale, alpha / rank."""
    targets: Annotated[tuple[Pattern, ...], MinLen(1)] = ALL_LINEAR
    """regexes of module paths such as `llm/layers/q_proj`, `dino/patch_embed`, `llm/lm_head`."""
    overrides: tuple[LoRAOverride, ...] = ()
    """rank and alpha of some of the targets, in place of the two above; the first that matches a path counts."""

    def __post_init__(self):
        check_fields(self)

    def adapts(self, path: str) -> bool:
        """Returns whether the module at a path, names with slashes between them, has adapters."""
        return any(re.search(pattern, path) for pattern in self.targets)

    def rank_of(self, path: str) -> int:
        """Returns the rank of the adapters of the module at a path."""
        return self._size_of(path).rank

    def scale_of(self, path: str) -> float:
        """Returns alpha / rank of the adapters of the module at a path."""
        size = self._size_of(path)
        return size.alpha / size.rank

    def _size_of(self, path: str) -> "LoRAConfig | LoRAOverride":
        matches = (override for override in self.overrides if re.search(override.pattern, path))
        return next(matches, self)


def check_patterns(config: LoRAConfig, paths: Sequence[str]) -> None:
    """Checks that every pattern of a configuration is about some product of the model.

    Args:
        config: the model's.
        paths: module paths of all products of the model that can have adapters.

    Raises:
        ValueError: a target matches none of them, or an override none of those that the targets match.
    """
    adapted = [path for path in paths if config.adapts(path)]
    patterns = [("targets", pattern, paths) for pattern in config.targets]
    patterns += [("overrides", override.pattern, adapted) for override in config.overrides]
    for field, pattern, candidates in patterns:
        if not any(re.search(pattern, path) for path in candidates):
            raise ValueError(f"lora.{field}: got {pattern!r}, expected a regex of one of {', '.join(candidates)}")


def name_targets(adapted: Collection[str], modules: Collection[str]) -> tuple[str, ...]:
    """Returns the shortest of the ways in which `LoRAConfig.targets` can name some of a model's modules."""
    for targets in (ALL_LINEAR, ATTENTION):
        if adapted == {module for module in modules if any(re.search(pattern, module) for pattern in targets)}:
            return targets
    return tuple(f"^{module}$" for module in sorted(adapted))


class Adapters(NamedTuple):
    """The adapters of one product, which adds `scale · (x a) b` to it."""

    a: jax.Array
    """float32 `[*in, rank]`, or `[..., in, rank]` of a stack of matrices."""
    b: jax.Array
    """float32 `[rank, *out]`, or `[..., rank, out]`."""
    scale: float


def module_adapters(
    module: nn.Module,
    config: LoRAConfig | None,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    *,
    path_prefix: str = "",
) -> Adapters | None:
    """Returns the adapters `[*in, rank]` and `[rank, *out]` of a module; None where its parameters have none.

    They are created, as parameters, when the module is initialised: A normal with deviation 1 / rank, B zero.

    Args:
        module: the calling module.
        config: of the model.
        in_shape: input axes of the module's kernel.
        out_shape: output axes of the module's kernel.
        path_prefix: path of the module that is applied, where this is not the whole model.

    Raises:
        ValueError: there are adapters and no config with their alpha.
    """
    path = "/".join(filter(None, (path_prefix, *module.path)))
    rank = 0 if config is None else config.rank_of(path)
    return _adapters(module, config, path, "", (*in_shape, rank), (rank, *out_shape))


def stacked_adapters(
    module: nn.Module, config: LoRAConfig | None, name: str, shape: tuple[int, ...], *, path_prefix: str = ""
) -> Adapters | None:
    """Returns the adapters `[..., in, rank]` and `[..., rank, out]` of one weight `[..., in, out]` of a module.

    Every matrix of the stack has adapters of its own, as in openpi, whose names they carry: `lora_a` beside a weight
    called `w`, and `<name>_lora_a` beside others. All else is as in `module_adapters`.
    """
    names = (path_prefix, *module.path, "" if name == "w" else name)
    path = "/".join(filter(None, names))
    prefix = "" if name == "w" else f"{name}_"
    rank = 0 if config is None else config.rank_of(path)
    return _adapters(module, config, path, prefix, (*shape[:-1], rank), (*shape[:-2], rank, shape[-1]))


def _adapters(
    module: nn.Module,
    config: LoRAConfig | None,
    path: str,
    prefix: str,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
) -> Adapters | None:
    if module.is_initializing():
        has_adapters = config is not None and config.adapts(path)
    else:
        has_adapters = module.has_variable("params", f"{prefix}lora_a")
    if not has_adapters:
        return None
    if config is None:
        raise ValueError(f"lora: got None, expected the LoRAConfig of the adapters at {path}")
    a = module.param(f"{prefix}lora_a", nn.initializers.normal(1 / config.rank_of(path)), a_shape, jnp.float32)
    b = module.param(f"{prefix}lora_b", nn.initializers.zeros, b_shape, jnp.float32)
    return Adapters(a, b, config.scale_of(path))


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


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at a path, names with slashes between them, is an adapter's."""
    return path.endswith(("lora_a", "lora_b"))


def adapter_names(path: str) -> tuple[str, str]:
    """Returns the paths that the adapters of a weight have, if there are any."""
    module, _, name = path.rpartition("/")
    prefix = f"{module}/" if name in ("kernel", "w") else f"{path}_"
    return f"{prefix}lora_a", f"{prefix}lora_b"


def adapted_module(path: str) -> str:
    """Returns the module, as `LoRAConfig` names it, of a weight or of an adapter."""
    return re.sub(r"(/kernel|/w|[/_]lora_[ab])$", "", path)


def drop_adapters(params: PyTree) -> PyTree:
    """Returns the parameters of the base model, the same arrays."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if not is_adapter(path[-1])})


def keep_adapters(params: PyTree) -> PyTree:
    """Returns the adapters alone, the same arrays."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if is_adapter(path[-1])})


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


def merge_adapters(params: PyTree, config: LoRAConfig) -> PyTree:
    """Returns parameters of the base model that compute the same as `params`, see `merge_weight`.

    Raises:
        ValueError: adapters have another rank than `config` gives them, so that their scale is not known.
    """
    merged = flatten_dict(params, sep="/")
    for path, names in [(path, adapter_names(path)) for path in merged]:
        if names[0] in merged:
            a, b = (merged.pop(name) for name in names)
            module = adapted_module(path)
            if a.shape[-1] != config.rank_of(module):
                got = f"got {config.rank_of(module)} for {module}"
                raise ValueError(f"lora.rank: {got}, expected {a.shape[-1]}, that of its adapters")
            merged[path] = merge_weight(merged[path], a, b, config.scale_of(module))
    return unflatten_dict(merged, sep="/")


def merge_weight(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns `W + scale A B`, the sum taken in float32 and rounded to the weight's type once.

    Args:
        weight: `[*stack, *in, *out]`, a stack of matrices if it has the first axes.
        a: `[*stack, *in, rank]`.
        b: `[*stack, rank, *out]`.
        scale: alpha / rank.
    """
    stack, rank = a.shape[: a.ndim + b.ndim - weight.ndim - 2], a.shape[-1]
    a, b = jnp.asarray(a, jnp.float32).reshape(*stack, -1, rank), jnp.asarray(b, jnp.float32).reshape(*stack, rank, -1)
    delta = scale * jnp.matmul(a, b, precision="highest").reshape(weight.shape)
    return (jnp.asarray(weight, jnp.float32) + delta).astype(weight.dtype)
