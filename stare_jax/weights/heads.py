"""Parameters that others' checkpoints do not have: value head and noise head, their side file, and initial values."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models import ModelConfig, make_policy
from stare_jax.models.nn.heads import NoiseHead, ValueHead
from stare_jax.models.normalize import identity_stats
from stare_jax.types import PyTree
from stare_jax.weights.safetensors_folder import Stored, check_tensors, list_file, write_file
from stare_jax.weights.tensor_table import Entry, Leaves, insert, leaf_at, leaf_shapes, place, table_specs, table_values

HEADS = "value_head.safetensors"
"""name of the side file, which the other programs pass over"""
_LINEAR = {"weight": ("kernel", "linear"), "bias": ("bias", "same")}


def head_table(config: ModelConfig) -> dict[str, Entry]:
    """Returns the places of the heads' leaves in their side file; the value head has RL4VLA's names."""
    layers = {f"value_head/layer_{i}": f"head_l{i + 1}" for i in range(len(config.value_dims))}
    if getattr(config, "noise", None) == "learned":
        names = [*(f"layer_{i}" for i in range(len(NoiseHead.hidden_dims))), "out"]
        layers |= {f"noise_head/{name}": f"noise_head.{name}" for name in names}
    table = {
        f"{module}/{leaf}": Entry((f"{theirs}.{name}",), kind)
        for module, theirs in layers.items()
        for name, (leaf, kind) in _LINEAR.items()
    }
    return table | {"value_head/out/kernel": Entry((f"head_l{len(config.value_dims) + 1}.weight",), "linear")}


def open_heads(folder: Path, config: ModelConfig) -> tuple[dict[str, Entry], dict[str, Stored]]:
    """Finds the heads in the side file of a folder; returns their table and tensors, both empty where it has none.

    Raises:
        WeightsError: the file is damaged, or of other heads.
    """
    file = folder / HEADS
    if not file.is_file():
        return {}, {}
    table, tensors = head_table(config), list_file(file)
    check_tensors(file, tensors, table_specs(table, leaf_shapes(config), "float32"))
    return table, tensors


def write_heads(to: Path, config: ModelConfig, leaves: Leaves) -> None:
    """Writes the side file of a folder."""
    table = head_table(config)
    write_file(to / HEADS, table_specs(table, leaf_shapes(config), "float32"), table_values(table, leaves, "float32"))


def fresh_params(
    config: ModelConfig, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct], paths: Collection[str]
) -> PyTree:
    """Returns initial values of some leaves, without allocating the rest of the model.

    Args:
        config: of the model.
        key: consumed.
        wanted: shape, dtype and, where the leaf is not to be a NumPy array, sharding of each.
        paths: the leaves to make.
    """
    if not paths:
        return {}

    def init(key):  # what is not returned is not computed
        if all(path.startswith(("value_head/", "noise_head/")) for path in paths):
            params = _init_heads(config, key, wanted)
        else:
            params = make_policy(config, identity_stats(config.action_dim, config.state_dim)).init(key)
        return {path: leaf_at(params, path).astype(wanted[path].dtype) for path in paths}

    tree: PyTree = {}
    for path, leaf in jax.device_get(jax.jit(init)(key)).items():
        insert(tree, path, place(wanted[path], np.asarray(leaf).__getitem__))
    return tree


def _init_heads(config: ModelConfig, key: jax.Array, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> PyTree:
    """Returns the heads alone, which takes seconds less than to trace the whole network."""
    heads = {
        "value_head": ValueHead(config.value_dims),
        "noise_head": NoiseHead(getattr(config, "model_action_dim", 1)),
    }
    params = {}
    for (name, head), part in zip(heads.items(), jax.random.split(key), strict=True):
        if (first := wanted.get(f"{name}/layer_0/kernel")) is not None:
            params[name] = head.init(part, jnp.zeros((1, first.shape[0])))["params"]
    return params
