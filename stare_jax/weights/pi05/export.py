"""Writes parameters of pi0.5 in the formats of others, leaf by leaf where the format lets it."""

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.nn.lora import LoRAConfig, merge_adapters
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.types import NormStats, PyTree
from stare_jax.weights.pi05.port import LEROBOT, LEROBOT_PREFIX
from stare_jax.weights.pi05.read import HEADS
from stare_jax.weights.pi05.statistics import ASSETS, STATS, to_openpi_stats
from stare_jax.weights.pi05.table import EMBEDDINGS, UNUSED, head_table, leaf_shapes, tensor_table
from stare_jax.weights.safetensors_folder import Spec, WeightsError, write_file, write_model
from stare_jax.weights.tensor_table import Leaves, Named, dtype_of, insert, table_specs, table_values

_ADAPTER = re.compile(r"lora_[ab]$")
Dtypes = str | Mapping[str, str]


def check_counterpart(config: Pi05Config) -> None:
    """Makes sure that a model is one that openpi's checkpoints have, its heads apart.

    Raises:
        WeightsError: names the parts that they do not have.
    """
    parts = {name: getattr(config, name) for name in ("stem", "state_tokens")}
    if foreign := [f"model.{name} = {value!r}" for name, value in parts.items() if value]:
        raise WeightsError(f"got a model with {', '.join(foreign)}, expected one that openpi's checkpoints have")


def adapter_names(path: str) -> tuple[str, str]:
    """Returns the paths that the adapters of a weight of the language model have, if there are any."""
    module, _, name = path.rpartition("/")
    prefix = f"{module}/" if name == "w" else f"{path}_"
    return f"{prefix}lora_a", f"{prefix}lora_b"


def leaf_order(config: Pi05Config, adapted: Collection[str]) -> list[str]:
    """Returns the parameters in the order in which they are written, adapters after what they are merged into."""
    order = [*head_table(config)]
    for path in tensor_table(config):
        order += [path, *(name for name in adapter_names(path) if name in adapted)]
    return order


def merged_leaves(leaves: Leaves, adapted: Collection[str], lora: LoRAConfig) -> Leaves:
    """Returns the parameters of the base model that compute what those with adapters do.

    Args:
        leaves: parameters, adapters among them.
        adapted: the paths of all of them.
        lora: how much adapters count.
    """

    def merged(path: str) -> np.ndarray:
        names = adapter_names(path)
        if names[0] not in adapted:
            return leaves(path)
        kernel, a, b = np.require(leaves(path), requirements="W"), leaves(names[0]), leaves(names[1])
        for i in range(len(kernel)):  # layer by layer, because the sum is taken in float32
            layer = {"module": {"w": kernel[i], "lora_a": a[i], "lora_b": b[i]}}
            kernel[i] = jax.device_get(_merge_adapters(layer, config=lora)["module"]["w"])
        return kernel

    return merged


_merge_adapters = jax.jit(merge_adapters, static_argnames="config")


def port_specs(config: Pi05Config, dtypes: Dtypes) -> dict[str, Spec]:
    """Returns all tensors of the port's file, in the order in which they are written."""
    specs = table_specs(tensor_table(config), leaf_shapes(config), dtypes)
    unused = dtypes if isinstance(dtypes, str) else dtypes[EMBEDDINGS[0]]
    return specs | {UNUSED: Spec(unused, (config.vocab_size, config.expert.width))}


def write_port(
    to: Path,
    config: Pi05Config,
    leaves: Leaves,
    *,
    form: str,
    dtypes: Dtypes,
    max_bytes: int | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes model.safetensors for openpi's PyTorch port or lerobot, of which the host holds a leaf at a time.

    Args:
        to: a folder.
        config: of the model.
        leaves: its parameters, adapters merged.
        form: "safetensors" or "lerobot".
        dtypes: of the tensors, or of each.
        max_bytes: of one file, of several with an index; None writes one, which is all that the port reads.
        on_bytes: called with the size of every tensor that is written.
    """
    prefix = LEROBOT_PREFIX if form == LEROBOT else ""
    specs = port_specs(config, dtypes)
    zeros = np.broadcast_to(np.zeros((), jnp.dtype(specs[UNUSED].dtype)), specs[UNUSED].shape)
    values = itertools.chain(table_values(tensor_table(config), leaves, dtypes), [(UNUSED, zeros)])
    named: Named = ((prefix + name, value) for name, value in values)
    specs = {prefix + name: spec for name, spec in specs.items()}
    if max_bytes is None:
        write_file(to / "model.safetensors", specs, named, on_bytes)
    else:
        write_model(to, specs, named, max_bytes=max_bytes, on_bytes=on_bytes)


def openpi_tree(
    config: Pi05Config, leaves: Leaves, dtypes: Dtypes, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> PyTree:
    """Returns openpi's tree, `{"params": ...}`, NumPy leaves; Orbax wants it whole."""
    tree: PyTree = {}
    for path in tensor_table(config):
        leaf = leaves(path).astype(jnp.dtype(dtype_of(path, dtypes)), copy=False)
        insert(tree, path, leaf)
        on_bytes(leaf.nbytes)
    return {"params": tree}


def write_heads(to: Path, config: Pi05Config, leaves: Leaves) -> None:
    """Writes the side file of value head and noise head, which none of the others read."""
    table = head_table(config)
    specs = table_specs(table, leaf_shapes(config), "float32")
    write_file(to / HEADS, specs, table_values(table, leaves, "float32"))


def write_stats(to: Path, asset_id: str, stats: NormStats) -> None:
    """Writes `assets/<asset id>/norm_stats.json` into a folder."""
    file = to / ASSETS / asset_id / STATS
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(to_openpi_stats(stats), indent=2) + "\n")


def adapter_paths(paths: Collection[str]) -> list[str]:
    """Returns those of parameters' paths that are adapters'."""
    return [path for path in paths if _ADAPTER.search(path)]
