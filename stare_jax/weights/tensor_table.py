"""Tables from the leaves of our trees to the tensors of other formats, and reading and writing along them.

An entry's tensors are rearranged, never computed with: both directions are views, and the numbers keep their bits.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models import ModelConfig
from stare_jax.models.blank import leaf_shapes
from stare_jax.state.storage import nest, num_bytes
from stare_jax.types import Array, PyTree
from stare_jax.weights.files import OnBytes, Spec, Specs, Tensors, read

FLOATS = ("float32", "bfloat16", "float16")
"""types that the tensors of a model may have"""
Leaves = Callable[[str], np.ndarray]
"""path of a parameter -> its value, read when it is asked for"""

KERNEL, SCALE = {"kernel": ("weight", "linear")}, {"scale": ("weight", "same")}
LINEAR = KERNEL | {"bias": ("bias", "vector")}
HEADS_IN = {"kernel": ("weight", "heads"), "bias": ("bias", "vector")}
CONV = {"kernel": ("weight", "conv"), "bias": ("bias", "same")}
NORM = SCALE | {"bias": ("bias", "same")}
"""leaves of a module -> their names in PyTorch and kinds"""
Rows = Mapping[str, tuple[str | tuple[str, ...], str | Mapping[str, tuple[str, str]]]]
"""leaf of ours -> its tensor, or the tensors of a layer that it stacks, and its kind; or module of ours -> its name and
leaves; {} is the number of a stacked layer"""


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


def widest(dtypes: Iterable[str]) -> str:
    """Returns the type of tensors that have the same, else one in which none of them is rounded."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "float32"


def make_entries(rows: Rows, num_layers: int = 0, *, ours: str = "", theirs: str = "") -> dict[str, Entry]:
    """Returns the table that rows describe, given the number of stacked layers and the beginnings of all names."""
    leaves: dict[str, tuple[str | tuple[str, ...], str]] = {}
    for path, (name, what) in rows.items():
        if isinstance(what, str):
            leaves[path] = (name, what)
        else:
            leaves |= {f"{path}/{leaf}": (f"{name}.{end}", kind) for leaf, (end, kind) in what.items()}
    table = {}
    for path, (name, kind) in leaves.items():
        parts = (name,) if isinstance(name, str) else name
        is_stacked = "{}" in parts[0]
        names = tuple(theirs + part.format(i) for i in range(num_layers if is_stacked else 1) for part in parts)
        table[ours + path] = Entry(names, kind, is_stacked + (len(parts) > 1))
    return table


def layer_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
    """Returns the shape of one of an entry's tensors in our arrangement, given that of the leaf."""
    return shape[entry.num_stacked :]


def _groups(kind: str, num_axes: int) -> tuple[tuple[int, ...], ...]:
    """Returns, for each axis that a tensor of a kind has in the checkpoint, the axes of ours that it joins."""
    axes = tuple(range(num_axes))
    return {
        "same": tuple((axis,) for axis in axes),
        "vector": (axes,),
        "leading": (axes[:2], *((axis,) for axis in axes[2:])),
        "linear": (axes[1:], axes[:1]),
        "heads": (axes[2:], axes[:2]),
        "per_head": (axes[::2], axes[1:2]),
        "conv": (axes[3:], axes[2:3], axes[:1], axes[1:2]),
        "pointwise": (axes[1:], axes[:1], (), ()),
    }[kind]


def checkpoint_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape that a leaf of ours, without its stacked axes, has in the checkpoint."""
    return tuple(math.prod(shape[axis] for axis in group) for group in _groups(kind, len(shape)))


def to_ours(tensor: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Returns one tensor of the checkpoint as a view in our arrangement, of the given shape."""
    order = sum(_groups(kind, len(shape)), ())
    # Axes are taken apart before they change places: a reshape after the transposition would copy.
    return tensor.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def to_checkpoint(leaf: np.ndarray, kind: str) -> np.ndarray:
    """Returns a leaf of ours, without its stacked axes, as the checkpoint arranges it."""
    return leaf.transpose(sum(_groups(kind, leaf.ndim), ())).reshape(checkpoint_shape(leaf.shape, kind))


def table_specs(table: Table, config: ModelConfig, dtype: str | Mapping[str, str]) -> dict[str, Spec]:
    """Returns the tensors of a model's table, in its order, given their type or the type of each."""
    specs = {}
    for path, entry in table.items():
        shape = checkpoint_shape(layer_shape(leaf_shapes(config)[path].shape, entry), entry.kind)
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
    part = functools.partial(read_leaf, entry, leaf, tensors)
    if any(tensors[name].load for name in entry.names):
        part = part().__getitem__  # read once, and not for every device
    return place(leaf, part)


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
