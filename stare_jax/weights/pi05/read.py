"""Weights of pi0.5 in the formats of others, found and compared with what the configuration asks for; read one by one.

Which format it is follows from what is in the files: openpi's tree (whose reading is Orbax's, see `train.checkpoint`),
the tensors of openpi's PyTorch port or of lerobot, or PaliGemma's arrays.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stare_jax.models.pi05.network import Pi05Config
from stare_jax.types import Array, PyTree
from stare_jax.weights.pi05.npz import list_npz, read_npz
from stare_jax.weights.pi05.port import LEROBOT, clean_names
from stare_jax.weights.pi05.sizes import port_shapes, read_lora, read_sizes
from stare_jax.weights.pi05.table import EMBEDDINGS, OUR_OWN, fresh_params, head_table, leaf_shapes, tensor_table
from stare_jax.weights.safetensors_folder import Spec, Stored, Tensors, WeightsError, check_tensors, list_file
from stare_jax.weights.tensor_table import FLOATS, insert, place, read_tree, table_specs

OPENPI, PORT, PALIGEMMA = "openpi", "safetensors", "paligemma"
HEADS = "value_head.safetensors"
"""side file of value head and noise head, which none of the formats know."""

_ADAPTERS = ("lora_a", "lora_b")
OnBytes = Callable[[int], None]
LoadLeaf = Callable[[str, jax.ShapeDtypeStruct], Array]
"""Loads a leaf of openpi's tree, given its path there, and shape, dtype and sharding to have it in."""


class Weights(NamedTuple):
    """Weights of others, checked and not read."""

    form: str
    """"openpi", "safetensors", "lerobot" or "paligemma"."""
    config: Pi05Config
    """with the sizes of the weights; `execution.param_dtype` is their type, float32 where there are several."""
    dtypes: dict[str, str]
    """of each leaf or tensor."""
    left: tuple[str, ...]
    """names of those that no part of ours corresponds to."""
    fresh: tuple[str, ...]
    """paths of leaves that are not there, and begin with random values."""
    read: Callable[[Mapping[str, jax.ShapeDtypeStruct], OnBytes], PyTree]
    """the leaves that are there, with the shapes, dtypes and shardings that are wanted."""


def check(what: Any, tensors: Tensors, expected: Mapping[str, Spec]) -> dict[str, str]:
    """Compares names and shapes, and makes sure that all are floats; returns the types.

    Raises:
        WeightsError: lists all that differ.
    """
    dtypes = {name: stored.spec.dtype for name, stored in tensors.items()}
    check_tensors(what, tensors, {n: s._replace(dtype=_float(dtypes.get(n, s.dtype))) for n, s in expected.items()})
    return dtypes


def _float(dtype: str) -> str:
    return dtype if dtype in FLOATS else FLOATS[0]


def _typed(config: Pi05Config, tensors: Tensors) -> Pi05Config:
    """Returns a configuration with the type of all weights, or that in which none of them is rounded."""
    found = {_float(stored.spec.dtype) for name, stored in tensors.items() if not name.endswith(_ADAPTERS)}
    dtype = found.pop() if len(found) == 1 else FLOATS[0]
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, dtype=dtype, param_dtype=dtype))


def open_port(source: Path, tensors: Tensors, *, base: Pi05Config, config: Pi05Config | None = None) -> Weights:
    """Opens the tensors of openpi's PyTorch port, or lerobot's.

    Args:
        source: the folder or file, for messages.
        tensors: what is in it.
        base: gives what no shape tells.
        config: what the model has to be; None takes it from the shapes.

    Raises:
        WeightsError: they are pi0's, or missing, unknown, of another shape, or no floats; all are listed.
    """
    clean = clean_names(source, tensors)
    if config is None:
        shapes = {name: stored.spec.shape for name, stored in clean.tensors.items()}
        config = _typed(read_sizes(source, port_shapes(shapes, base, EMBEDDINGS[0]), base), clean.tensors)
    table = tensor_table(config)
    dtypes = check(source, clean.tensors, table_specs(table, leaf_shapes(config), FLOATS[0]))
    own = _own(config, table)

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct], on_bytes: OnBytes) -> PyTree:
        return read_tree(table, clean.tensors, wanted, on_bytes)

    form = LEROBOT if clean.is_lerobot else PORT
    return Weights(form, config, dtypes, clean.left, own, read)


def open_openpi(
    source: Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    load: LoadLeaf,
    *,
    base: Pi05Config,
    config: Pi05Config | None = None,
) -> Weights:
    """Opens openpi's tree, adapters among its leaves or not.

    Args:
        source: the folder, for messages.
        stored: its leaves, by path.
        load: loads one.
        base: gives what no shape tells.
        config: what the model has to be; None takes it from the shapes. Adapters are read where it has some.

    Raises:
        WeightsError: they are pi0's, or missing, unknown, of another shape, or no floats; all are listed.
    """
    names = openpi_names(source, stored)
    tensors = {
        path: Stored(Spec(jnp.dtype(stored[name].dtype).name, tuple(stored[name].shape)), source, 0)
        for path, name in names.items()
    }
    shapes = {path: tensor.spec.shape for path, tensor in tensors.items()}
    lora = read_lora(source, shapes)
    if config is None:
        config = dataclasses.replace(_typed(read_sizes(source, shapes, base), tensors), lora=lora)
    expected = _expected(config, with_adapters=lora is not None)
    dtypes = check(source, tensors, expected)

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct], on_bytes: OnBytes) -> PyTree:
        tree: PyTree = {}
        for path in expected:
            insert(tree, path, load(names[path], wanted[path]))
            on_bytes(wanted[path].size * jnp.dtype(wanted[path].dtype).itemsize)
        return tree

    return Weights(OPENPI, config, dtypes, (), _own(config, expected), read)


def openpi_names(source: Any, stored: Mapping[str, Any]) -> dict[str, str]:
    """Returns the paths of openpi's leaves in our tree, and what they are in the file.

    Raises:
        WeightsError: they are not under `params`, or pi0's.
    """
    paths = {name: name.removeprefix("params/") for name in stored}
    if foreign := [name for name, path in paths.items() if path == name]:
        raise WeightsError(f"{source}: got {', '.join(sorted(foreign)[:5])}, expected all leaves under params/")
    if all(path.endswith("/value") for path in paths.values()):  # as the state of an NNX module has it
        paths = {name: path.removesuffix("/value") for name, path in paths.items()}
    old = [p for p in paths.values() if p.endswith("_norm_1/scale") or p.startswith(("state_proj/", "action_time_"))]
    if old:
        raise WeightsError(f"{source}: got weights of pi0 ({', '.join(sorted(old)[:5])}), expected pi0.5's")
    return {path: name for name, path in paths.items()}


def open_paligemma(source: Path, *, base: Pi05Config, config: Pi05Config | None = None) -> Weights:
    """Opens PaliGemma's arrays, which are the vision tower and the first expert; the rest of pi0.5 begins afresh.

    Args:
        source: an npz file.
        base: gives what no shape tells.
        config: what the model has to be; None takes it from the shapes.

    Raises:
        WeightsError: arrays are missing, unknown, of another shape, or no floats; all are listed.
    """
    arrays = list_npz(source)
    names = {f"PaliGemma/{name.removeprefix('params/')}": name for name in arrays}
    tensors = {path: Stored(arrays[name], source, 0) for path, name in names.items()}
    if config is None:
        shapes = {path: tensor.spec.shape for path, tensor in tensors.items()}
        config = _typed(read_sizes(source, shapes, base), tensors)
    everything = _expected(config, with_adapters=False)
    expected = {path: spec for path, spec in everything.items() if is_paligemma(path)}
    dtypes = check(source, tensors, expected)

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct], on_bytes: OnBytes) -> PyTree:
        tree: PyTree = {}
        for path in expected:
            value = read_npz(source, names[path]).astype(jnp.dtype(wanted[path].dtype), copy=False)
            insert(tree, path, place(wanted[path], value.__getitem__))
            on_bytes(wanted[path].size * jnp.dtype(wanted[path].dtype).itemsize)
        return tree

    return Weights(PALIGEMMA, config, dtypes, (), _own(config, expected), read)


def is_paligemma(path: str) -> bool:
    """Returns whether a leaf of ours is PaliGemma's, and not the action expert's, nor beside both."""
    return path.startswith("PaliGemma/") and not any(name.endswith("_1") for name in _modules(path))


def _modules(path: str) -> list[str]:
    """Returns the names in a path that an expert's number can be part of; the tower numbers its norms, too."""
    return [] if path.startswith("PaliGemma/img/") else path.split("/")


def _expected(config: Pi05Config, *, with_adapters: bool) -> dict[str, Spec]:
    """Returns the leaves of openpi's tree."""
    shapes = leaf_shapes(config)
    paths = [path for path in shapes if not path.startswith(OUR_OWN)]
    if not with_adapters:
        paths = [path for path in paths if not path.endswith(_ADAPTERS)]
    return {path: Spec(FLOATS[0], shapes[path].shape) for path in paths}


def _own(config: Pi05Config, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the leaves, adapters apart, that are not given."""
    return tuple(p for p in leaf_shapes(config) if p not in given and not p.endswith(_ADAPTERS))


def with_heads(folder: Path, weights: Weights, *, config: Pi05Config | None = None) -> Weights:
    """Returns weights together with value head and noise head, where a folder has the side file of them.

    Args:
        folder: where the side file may be.
        weights: without.
        config: what the model has to be; None takes the heads' sizes from the file.

    Raises:
        WeightsError: the file is damaged, or of other heads.
    """
    file = folder / HEADS
    if not file.is_file():
        return weights
    tensors = list_file(file)
    config = config or _with_heads(weights.config, tensors)
    table, shapes = head_table(config), leaf_shapes(config)
    check(file, tensors, table_specs(table, shapes, FLOATS[0]))

    def read(wanted: Mapping[str, jax.ShapeDtypeStruct], on_bytes: OnBytes) -> PyTree:
        heads = read_tree(table, tensors, wanted, on_bytes)  # first, as it is small
        return weights.read(wanted, on_bytes) | heads

    fresh = tuple(path for path in shapes if path in _own(config, table) and path in weights.fresh)
    return weights._replace(config=config, fresh=fresh, read=read)


def _with_heads(config: Pi05Config, tensors: Tensors) -> Pi05Config:
    hidden = sorted(name for name in tensors if name.startswith("head_l") and name.endswith(".bias"))
    dims = tuple(tensors[name].spec.shape[0] for name in hidden)
    noise = "learned" if any(name.startswith("noise_head.") for name in tensors) else config.noise
    return dataclasses.replace(config, value_dims=dims or config.value_dims, noise=noise)


def load_weights(
    weights: Weights,
    key: jax.Array,
    *,
    config: Pi05Config,
    like: PyTree | None = None,
    on_bytes: OnBytes = lambda num_bytes: None,
) -> PyTree:
    """Reads weights, each leaf onto its devices, and makes what is not there, adapters apart.

    Args:
        weights: see `open_port` and so on.
        key: of what is not there; consumed.
        config: of the model.
        like: `jax.ShapeDtypeStruct`s of its parameters, with the shardings that they are to have; None gives NumPy
            arrays.
        on_bytes: called with the size of every leaf that is there.
    """
    wanted = leaf_shapes(config)
    if like is not None:
        leaves = jax.tree.leaves_with_path(like)
        wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    params = weights.read(wanted, on_bytes)
    fresh = fresh_params(config, key, wanted, weights.fresh)
    on_bytes(sum(wanted[path].size * jnp.dtype(wanted[path].dtype).itemsize for path in weights.fresh))
    return _join(params, fresh)


def _join(params: PyTree, others: PyTree) -> PyTree:
    joined = dict(params)
    for name, value in others.items():
        joined[name] = _join(joined[name], value) if isinstance(joined.get(name), dict) else value
    return joined
