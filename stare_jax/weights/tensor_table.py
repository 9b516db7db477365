"""Tables from the leaves of our trees to the tensors of other formats, and reading and writing along them.

An entry's tensors are rearranged, never computed with: both directions are views, and the numbers keep their bits.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models import ModelConfig, make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.state.storage import flatten, nest
from stare_jax.state.train_state import num_bytes
from stare_jax.types import Array, PyTree
from stare_jax.weights.files import OnBytes, Spec, Specs, Tensors, read

FLOATS = ("float32", "bfloat16", "float16")
"""types that the tensors of a model may have"""
Leaves = Callable[[str], np.ndarray]
"""path of a parameter -> its value, read when it is asked for"""

LINEAR = {"kernel": ("weight", "linear"), "bias": ("bias", "vector")}
HEADS_IN = {"kernel": ("weight", "heads"), "bias": ("bias", "vector")}
CONV = {"kernel": ("weight", "conv"), "bias": ("bias", "same")}
NORM = {"scale": ("weight", "same"), "bias": ("bias", "same")}
"""leaves of a module -> their names in PyTorch and kinds"""
Rows = Mapping[str, tuple[str, str | Mapping[str, tuple[str, str]]]]
"""leaf of ours -> its tensor and kind, or module of ours -> its name and leaves; {} is the number of a stacked layer"""


class Entry(NamedTuple):
    """Place of one leaf of our tree in a checkpoint."""

    names: tuple[str, ...]
    """tensors: one, or those that are stacked, the last of the stacked axes fastest"""
    kind: str
    """"same"; "vector", flat; "leading", without our first axis, of one; "linear", transposed, with one input axis;
    "heads", with two; "per_head", each head's matrix transposed; "conv"; "pointwise", a convolution of 1x1"""
    num_stacked: int = 0
    """leading axes of ours over which tensors are stacked: none, the layers, or layers and one more"""


Table = Mapping[str, Entry]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""both by the path of a leaf"""


def make_entries(rows: Rows, num_layers: int = 0) -> dict[str, Entry]:
    """Returns the table that rows describe, given the number of stacked layers."""
    leaves: dict[str, tuple[str, str]] = {}
    for ours, (theirs, what) in rows.items():
        if isinstance(what, str):
            leaves[ours] = (theirs, what)
        else:
            leaves |= {f"{ours}/{leaf}": (f"{theirs}.{name}", kind) for leaf, (name, kind) in what.items()}
    return {
        path: Entry(tuple(map(name.format, range(num_layers))), kind, 1) if "{}" in name else Entry((name,), kind)
        for path, (name, kind) in leaves.items()
    }


_NUM_IN = {"linear": 1, "heads": 2, "pointwise": 1}
_ORDER = {"conv": (3, 2, 0, 1), "per_head": (0, 2, 1)}


def _order(kind: str, num_axes: int) -> tuple[int, ...]:
    """Returns our axes in the order in which the checkpoint has them, before it joins some of them."""
    num_in = _NUM_IN.get(kind, 0)
    return _ORDER.get(kind, (*range(num_in, num_axes), *range(num_in)))


def layer_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
    """Returns the shape of one of an entry's tensors in our arrangement, given that of the leaf."""
    return shape[entry.num_stacked :]


def checkpoint_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape that a leaf of ours, without its stacked axes, has in the checkpoint."""
    ordered = tuple(shape[axis] for axis in _order(kind, len(shape)))
    if kind == "vector":
        return (math.prod(shape),)
    if kind == "leading":
        return shape[1:]
    if kind == "pointwise":
        return (*ordered, 1, 1)
    if kind in ("linear", "heads", "per_head"):
        num_out = 2 if kind == "per_head" else len(shape) - _NUM_IN[kind]
        return (math.prod(ordered[:num_out]), math.prod(ordered[num_out:]))
    return ordered


def to_ours(tensor: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Returns one tensor of the checkpoint as a view in our arrangement, of the given shape."""
    order = _order(kind, len(shape))
    # Axes are taken apart before they change places: a reshape after the transposition would copy.
    return tensor.reshape(tuple(shape[axis] for axis in order)).transpose(tuple(np.argsort(order)))


def to_checkpoint(leaf: np.ndarray, kind: str) -> np.ndarray:
    """Returns a leaf of ours, without its stacked axes, as the checkpoint arranges it."""
    return leaf.transpose(_order(kind, leaf.ndim)).reshape(checkpoint_shape(leaf.shape, kind))


def table_specs(table: Table, shapes: Shapes, dtype: str | Mapping[str, str]) -> dict[str, Spec]:
    """Returns the tensors of a table, in its order, given the shapes of our leaves, and the type or each tensor's."""
    specs = {}
    for path, entry in table.items():
        shape = checkpoint_shape(layer_shape(shapes[path].shape, entry), entry.kind)
        specs |= {name: Spec(dtype if isinstance(dtype, str) else dtype[name], shape) for name in entry.names}
    return specs


def table_values(table: Table, leaves: Leaves, specs: Specs, *, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a table as the checkpoint has them; no leaf is kept while the next one is loaded."""
    for path, entry in table.items():
        leaf = leaves(path)
        layers = leaf.reshape(-1, *layer_shape(leaf.shape, entry))
        del leaf
        for i, name in enumerate(entry.names):
            dtype = jnp.dtype(specs[name].dtype)
            yield prefix + name, to_checkpoint(layers[i], entry.kind).astype(dtype, copy=False)
        del layers


def read_tree(table: Table, tensors: Tensors, wanted: Shapes, on_bytes: OnBytes = lambda num_bytes: None) -> PyTree:
    """Reads all leaves of a table, one after the other; those without a sharding become NumPy arrays.

    Large leaves come first: reading a leaf takes memory besides the leaf itself, and the rest of the model leaves room
    for it as long as that has not been read.
    """
    leaves = {}
    for path in sorted(table, key=lambda path: -num_bytes(wanted[path])):
        leaves[path] = _read_whole(table[path], wanted[path], tensors)
        on_bytes(num_bytes(wanted[path]))
    return nest(leaves)


def _read_whole(entry: Entry, leaf: jax.ShapeDtypeStruct, tensors: Tensors) -> Array:
    if leaf.sharding is None or all(tensors[name].load is None for name in entry.names):
        return place(leaf, lambda index: read_leaf(entry, leaf, tensors, index))
    whole = read_leaf(entry, leaf, tensors)  # once, and not for every device
    return place(leaf, lambda index: whole[index])


def read_leaf(
    entry: Entry, leaf: jax.ShapeDtypeStruct, tensors: Tensors, index: tuple[slice, ...] = (...,)
) -> np.ndarray:
    """Reads a part of one leaf, given its whole shape and wanted type, from as little of the files as it takes."""
    inner, num_stacked = layer_shape(leaf.shape, entry), entry.num_stacked

    def layer(name: str, index: tuple) -> np.ndarray:
        return to_ours(read(tensors[name]), inner, entry.kind)[index]

    if not num_stacked:
        # A view of a file is copied, an array that was loaded is not.
        copy = True if tensors[entry.names[0]].load is None else None
        return np.array(layer(entry.names[0], index), leaf.dtype, order="C", copy=copy)
    index = index if index != (...,) else (slice(None),) * len(leaf.shape)
    names = np.array(entry.names, object).reshape(leaf.shape[:num_stacked])[index[:num_stacked]]
    part = np.empty((*names.shape, *layer(names.flat[0], index[num_stacked:]).shape), leaf.dtype)
    for where in np.ndindex(*names.shape):
        part[where] = layer(names[where], index[num_stacked:])
    return part


def place(leaf: jax.ShapeDtypeStruct, part: Callable[[tuple[slice, ...]], np.ndarray]) -> Array:
    """Makes an array of parts, each where its sharding has it; a NumPy array where there is no sharding."""
    if leaf.sharding is None:
        return part((...,))
    array = jax.make_array_from_callback(leaf.shape, leaf.sharding, part, dtype=leaf.dtype)
    return array.block_until_ready()


def leaf_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every leaf of a model's parameters, by path, without allocating it."""
    return dict(_leaf_shapes(dataclasses.replace(config, tokenizer="")))


@functools.lru_cache(maxsize=16)
def _leaf_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
    return flatten(jax.eval_shape(policy.init, jax.random.key(0)))


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is one of an adapter's."""
    return path.endswith(("lora_a", "lora_b"))


def adapter_names(path: str) -> tuple[str, str]:
    """Returns the paths that the adapters of a weight have, if there are any."""
    module, _, name = path.rpartition("/")
    prefix = f"{module}/" if name in ("kernel", "w") else f"{path}_"
    return f"{prefix}lora_a", f"{prefix}lora_b"


def adapted_module(path: str) -> str:
    """Returns the module, as `LoRAConfig` names it, of a weight or of an adapter."""
    return re.sub(r"(/kernel|/w|[/_]lora_[ab])$", "", path)
