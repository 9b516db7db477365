"""Reads an OpenVLA checkpoint folder in Hugging Face's format into our configuration, parameters and statistics.

One table says where every tensor goes; names, types and shapes are compared before anything is read. Tensors are read
one by one, straight into the parts of an array that a device holds: the host never has the model a second time.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stare_jax.models.nn.heads import ValueHead
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.types import Array, NormStats, PyTree
from stare_jax.weights.openvla.config import read_config, read_norm_stats
from stare_jax.weights.openvla.table import leaf_shapes, tensor_table, unused_specs, value_head_table
from stare_jax.weights.safetensors_folder import (
    Stored,
    WeightsError,
    check_tensors,
    list_file,
    list_model,
    read,
)
from stare_jax.weights.tensor_table import FLOATS, insert, leaf_at, place, read_tree, table_specs

VALUE_HEAD = "value_head.safetensors"
"""side file of the value head, which the public format does not know."""


class LoadedOpenVLA(NamedTuple):
    """What a checkpoint folder holds."""

    config: OpenVLAConfig
    params: PyTree
    """our parameter tree, NumPy leaves; the value head is freshly initialised unless the folder has one."""
    unused: dict[str, Array]
    """tensors that OpenVLA never runs (last blocks, final norms, attention pool), as they are in the files."""
    norm_stats: NormStats


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint folder, checked and not read."""

    dtype: str
    """of all of them."""
    tensors: dict[str, Stored]
    """those that our parameters hold."""
    unused: dict[str, Stored]
    """those that are never run."""


def load_openvla(
    folder: str | Path, key: jax.Array, *, config: OpenVLAConfig | None = None, unnorm_key: str | None = None
) -> LoadedOpenVLA:
    """Loads a checkpoint folder: config.json, model*.safetensors, and dataset_statistics.json where there is one.

    Args:
        folder: the checkpoint.
        key: for the value head, which public checkpoints do not have; consumed.
        config: what to build instead of what config.json says.
        unnorm_key: data set whose action statistics to use; may be left out where there is only one.

    Raises:
        WeightsError: files are damaged, tensors are missing, unknown or of another type or shape (all are listed), or
            the data set is unknown.
    """
    config = config or read_config(folder)
    norm_stats = read_norm_stats(folder, unnorm_key=unnorm_key, state_dim=config.state_dim)
    checkpoint = open_checkpoint(folder, config)
    unused = {name: read(stored) for name, stored in checkpoint.unused.items()}
    return LoadedOpenVLA(config, load_openvla_params(folder, key, config=config), unused, norm_stats)


def open_checkpoint(folder: str | Path, config: OpenVLAConfig) -> Checkpoint:
    """Finds the tensors of a checkpoint folder and compares them with what the configuration asks for.

    Raises:
        WeightsError: files are damaged, or tensors are missing, unknown or of another type or shape; all are listed.
    """
    tensors = list_model(Path(folder))
    dtypes = {stored.spec.dtype for stored in tensors.values()}
    # Where tensors differ among each other, config.json says which are right.
    dtype = dtypes.pop() if len(dtypes) == 1 else config.execution.param_dtype
    if dtype not in FLOATS:
        raise WeightsError(f"{folder}: got tensors of {dtype}, expected one of {FLOATS}")
    used, unused = table_specs(tensor_table(config), leaf_shapes(config), dtype), unused_specs(config, dtype)
    check_tensors(folder, tensors, used | unused)
    return Checkpoint(dtype, *({name: tensors[name] for name in part} for part in (used, unused)))


def load_openvla_params(
    folder: str | Path,
    key: jax.Array,
    *,
    config: OpenVLAConfig,
    like: PyTree | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> PyTree:
    """Loads the parameters of a checkpoint folder, whatever its statistics; adapters are not among them.

    Args:
        folder: the checkpoint.
        key: for the value head, where the folder has none; consumed.
        config: what to build.
        like: `jax.ShapeDtypeStruct`s of the base model's parameters, with the shardings that they are to have; None
            gives NumPy arrays in `config.execution.param_dtype`.
        on_bytes: called with the size of every leaf that is read.

    Raises:
        WeightsError: as for `open_checkpoint`.
    """
    shapes, table = leaf_shapes(config), tensor_table(config)
    if like is None:
        dtype = jnp.dtype(config.execution.param_dtype)
        wanted = {path: jax.ShapeDtypeStruct(shapes[path].shape, dtype) for path in table}
        wanted |= {path: shapes[path] for path in value_head_table(config)}
    else:
        leaves = jax.tree.leaves_with_path(like)
        wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    tensors = open_checkpoint(folder, config).tensors
    # First, so that what is wrong with it is found before everything else is read.
    head = load_value_head(folder, key, config=config, wanted=wanted)
    return read_tree(table, tensors, wanted, on_bytes) | head


def load_value_head(
    folder: str | Path, key: jax.Array, *, config: OpenVLAConfig, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> PyTree:
    """Loads the value head of a folder's side file, or makes a new one.

    Args:
        folder: of the checkpoint, or of an adapter.
        key: for a new one; consumed.
        config: of the model.
        wanted: shapes, dtypes and shardings by path.

    Returns:
        A tree with the one entry "value_head".

    Raises:
        WeightsError: the file is damaged, or of another value head.
    """
    table, file = value_head_table(config), Path(folder) / VALUE_HEAD
    if file.exists():
        tensors = list_file(file)
        check_tensors(file, tensors, table_specs(table, wanted, "float32"))
        return read_tree(table, tensors, wanted)
    num_features = wanted["value_head/layer_0/kernel"].shape[0]
    # Compiled as a whole: op by op it is dozens of compilations.
    init = jax.jit(lambda key: ValueHead(config.value_dims).init(key, jnp.zeros((1, num_features)))["params"])
    fresh, tree = {"value_head": jax.device_get(init(key))}, {}
    for path in table:
        insert(tree, path, place(wanted[path], leaf_at(fresh, path).__getitem__))
    return tree
