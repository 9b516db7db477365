"""Parameters that others' checkpoints do not have: value head and noise head, their side file, and initial values."""

from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from stare_jax.models import ModelConfig, make_policy
from stare_jax.models.nn.heads import NoiseHead
from stare_jax.models.normalize import identity_stats
from stare_jax.state.storage import flatten
from stare_jax.types import Array
from stare_jax.weights.files import Stored, check_tensors, list_file, write_file
from stare_jax.weights.side_files import HEADS
from stare_jax.weights.tensor_table import (
    LINEAR,
    Entry,
    Leaves,
    Shapes,
    leaf_shapes,
    make_entries,
    place,
    table_specs,
    table_values,
)


def head_table(config: ModelConfig) -> dict[str, Entry]:
    """Returns the places of the heads' leaves in their side file; the value head has RL4VLA's names."""
    num_layers = len(config.value_dims)
    rows = {f"value_head/layer_{i}": (f"head_l{i + 1}", LINEAR) for i in range(num_layers)}
    rows["value_head/out"] = (f"head_l{num_layers + 1}", {"kernel": LINEAR["kernel"]})
    if getattr(config, "noise", None) == "learned":
        names = [*(f"layer_{i}" for i in range(len(NoiseHead.hidden_dims))), "out"]
        rows |= {f"noise_head/{name}": (f"noise_head.{name}", LINEAR) for name in names}
    return make_entries(rows)


def open_heads(folder: Path, config: ModelConfig) -> tuple[dict[str, Entry], dict[str, Stored]]:
    """Returns table and tensors of a folder's heads, empty without a side file; raises WeightsError for other heads."""
    file = folder / HEADS
    if not file.is_file():
        return {}, {}
    table, tensors = head_table(config), list_file(file)
    check_tensors(file, tensors, table_specs(table, leaf_shapes(config), "float32"))
    return table, tensors


def write_heads(to: Path, config: ModelConfig, leaves: Leaves) -> None:
    """Writes the side file of a folder."""
    table = head_table(config)
    specs = table_specs(table, leaf_shapes(config), "float32")
    write_file(to / HEADS, specs, table_values(table, leaves, specs))


def fresh_leaves(config: ModelConfig, key: jax.Array, wanted: Shapes, paths: Collection[str]) -> dict[str, Array]:
    """Returns initial values of the leaves at some paths, without allocating the rest of the model; consumes the key.

    Leaves have the types and shardings that are wanted; those without a sharding are NumPy arrays.
    """
    if not paths:
        return {}

    def init(key):  # what is not returned is not computed
        params = flatten(make_policy(config, identity_stats(config.action_dim, config.state_dim)).init(key))
        return {path: params[path].astype(wanted[path].dtype) for path in paths}

    leaves = jax.device_get(jax.jit(init)(key))
    return {path: place(wanted[path], np.asarray(leaf).__getitem__) for path, leaf in leaves.items()}
