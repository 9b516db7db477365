"""Writes parameters as an OpenVLA checkpoint folder in Hugging Face's format, one leaf in memory at a time."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.nn.lora import LoRAConfig, merge_adapters
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.openvla.config import CONFIG, STATISTICS, write_json
from stare_jax.weights.openvla.read import VALUE_HEAD
from stare_jax.weights.openvla.side_files import Base, copy_side_files
from stare_jax.weights.openvla.table import leaf_shapes, tensor_table, unused_specs, value_head_table
from stare_jax.weights.safetensors_folder import Spec, WeightsError, read, read_json, write_file, write_model
from stare_jax.weights.tensor_table import Leaves, table_specs, table_values


def check_counterpart(config: OpenVLAConfig, base: Base) -> None:
    """Makes sure that a model is the checkpoint's, whatever its weights.

    Raises:
        WeightsError: the model has parts that OpenVLA does not have, or differs from the checkpoint; names the fields.
    """
    parts = {name: getattr(config, name) for name in ("stem", "state_tokens")}
    foreign = [f"model.{name} = {value!r}" for name, value in parts.items() if value]
    if foreign:
        raise WeightsError(f"got a model with {', '.join(foreign)}, expected one that OpenVLA's checkpoints have")
    got, expected = _meaning(config), _meaning(base.config)
    problems = [
        f"model.{name}: got {got[name]}, expected {expected[name]}" for name in got if got[name] != expected[name]
    ]
    if problems:
        raise WeightsError(f"the model is not that of {base.folder}:\n  " + "\n  ".join(problems))


def _meaning(config: OpenVLAConfig) -> dict[str, Any]:
    """Returns what a checkpoint's tensors are and how they are used, as far as a checkpoint says it."""
    names = ("projector_dim", "llm", "action_vocab_end", "image_size")
    meaning = {name: getattr(config, name) for name in names}
    for name in ("dino", "siglip"):
        tower = getattr(config, name)
        # Initial values are of no concern, and the images' normalisation is published with different rounding.
        meaning[name] = dataclasses.replace(tower, mean=(0,) * 3, std=(1,) * 3, layer_scale=tower.layer_scale and 1.0)
    return meaning


def export_specs(config: OpenVLAConfig, dtype: str) -> dict[str, Spec]:
    """Returns all tensors of the checkpoint of a model, in the order in which they are written."""
    return table_specs(tensor_table(config), leaf_shapes(config), dtype) | unused_specs(config, dtype)


def write_openvla(
    to: Path,
    base: Base,
    config: OpenVLAConfig,
    leaves: Leaves,
    *,
    dtype: str,
    max_bytes: int,
    merge_unused: Callable[[str, np.ndarray], np.ndarray] = lambda name, tensor: tensor,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a whole checkpoint folder.

    Args:
        to: an empty folder.
        base: gives what our parameters do not have.
        config: of the model.
        leaves: its parameters, adapters merged.
        dtype: of the tensors; other parameters are rounded to it.
        max_bytes: see `write_model`.
        merge_unused: what to make of a tensor that is never run, given its name.
        on_bytes: called with the size of every tensor that is written.
    """
    copy_side_files(base.folder, to)
    if {stored.spec.dtype for stored in base.unused.values()} != {dtype}:
        write_json(to / CONFIG, read_json(to / CONFIG) | {"torch_dtype": dtype})
    write_value_head(to, config, leaves)
    kept = ((name, read(base.unused[name])) for name in unused_specs(config, dtype))
    unused = ((name, merge_unused(name, tensor).astype(jnp.dtype(dtype))) for name, tensor in kept)
    values = itertools.chain(table_values(tensor_table(config), leaves, dtype), unused)
    write_model(to, export_specs(config, dtype), values, max_bytes=max_bytes, on_bytes=on_bytes)


def write_value_head(to: Path, config: OpenVLAConfig, leaves: Leaves) -> None:
    """Writes the value head's side file, which Hugging Face's own loader passes over."""
    table = value_head_table(config)
    specs = table_specs(table, leaf_shapes(config), "float32")
    write_file(to / VALUE_HEAD, specs, table_values(table, leaves, "float32"))


def merged_leaves(leaves: Leaves, adapted: Collection[str], lora: LoRAConfig) -> Leaves:
    """Returns the parameters of the base model that compute what those with adapters do.

    Args:
        leaves: parameters, adapters among them.
        adapted: the paths of all of them.
        lora: how much adapters count.
    """

    def merged(path: str) -> np.ndarray:
        module, _, name = path.rpartition("/")
        if name != "kernel" or f"{module}/lora_a" not in adapted:
            return leaves(path)
        kernel, a, b = leaves(path), leaves(f"{module}/lora_a"), leaves(f"{module}/lora_b")
        if a.ndim + b.ndim == kernel.ndim + 2:
            return _merge(kernel, a, b, lora)
        kernel = np.require(kernel, requirements="W")
        for i in range(len(kernel)):  # layer by layer, because the sum is taken in float32
            kernel[i] = _merge(kernel[i], a[i], b[i], lora)
        return kernel

    return merged


def merge_tensor(weight: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig) -> np.ndarray:
    """Returns a linear layer's weight `[out, in]` with its adapters `[rank, in]` and `[out, rank]` in it."""
    return _merge(weight.T, a.T, b.T, lora).T


def _merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig) -> np.ndarray:
    params = {"module": {"kernel": kernel, "lora_a": a, "lora_b": b}}
    return jax.device_get(_merge_adapters(params, config=lora)["module"]["kernel"])


_merge_adapters = jax.jit(merge_adapters, static_argnames="config")


def add_statistics(to: Path, statistics: Mapping[str, Any]) -> None:
    """Puts statistics of data sets, by name, over those of a folder, in both places where they are looked for."""
    side = read_json(to / STATISTICS) if (to / STATISTICS).exists() else {}
    write_json(to / STATISTICS, {**side, **statistics})
    if (to / CONFIG).exists():
        description = read_json(to / CONFIG)
        description["norm_stats"] = {**(description.get("norm_stats") or {}), **statistics}
        write_json(to / CONFIG, description)


def widest_dtype(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the type in which none of the parameters that a checkpoint holds is rounded, given all of ours."""
    ours = re.compile(r"^value_head/|/lora_[ab]$")
    dtypes = {jnp.dtype(leaf.dtype).name for path, leaf in shapes.items() if not ours.search(path)}
    return dtypes.pop() if len(dtypes) == 1 else "float32"
