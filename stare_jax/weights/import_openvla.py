"""From a checkpoint in Hugging Face's format to a folder that a run can start from."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from stare_jax.config import ConfigError, user_input
from stare_jax.logging import new_directory, progress_bytes
from stare_jax.models import OpenVLAConfig, make_policy
from stare_jax.models.nn.lora import add_adapters, drop_adapters
from stare_jax.sharding.mesh import make_mesh, path_name
from stare_jax.state.train_state import abstract_params, num_bytes
from stare_jax.types import PyTree
from stare_jax.weights.folders import check_space, save_converted
from stare_jax.weights.openvla.config import read_norm_stats
from stare_jax.weights.openvla.read import VALUE_HEAD, load_openvla_params, load_value_head
from stare_jax.weights.openvla.side_files import KEPT, Base, keep_aside, open_base
from stare_jax.weights.peft import Adapter, keep_adapter, open_adapter
from stare_jax.weights.tensor_table import FLOATS, read_tree


class Imported(NamedTuple):
    """What came of an import."""

    config: OpenVLAConfig
    num_params: int
    num_bytes: int
    """of the parameters."""
    num_unused: int
    """tensors that are kept aside."""
    left: tuple[str, ...]
    """names of what was not taken along."""


def import_openvla(
    source: Path,
    to: Path,
    *,
    adapter: Path | None = None,
    unnorm_key: str | None = None,
    dtype: str | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 0,
) -> Imported:
    """Converts a checkpoint folder; the result is there when it is complete, or not at all.

    Args:
        source: config.json, model*.safetensors, tokenizer, statistics.
        to: a new folder: `checkpoints/0` with the parameters, `huggingface` with everything else.
        adapter: a PEFT folder, whose adapters become part of the parameters.
        unnorm_key: data set whose statistics the policy has; may be left out where there is only one.
        dtype: of the parameters, adapters and value head apart; None takes the checkpoint's.
        fsdp: over how many devices weights are cut while they are read and saved, and `tensor` likewise.
        tensor: see `sharding.make_mesh`.
        seed: of a new value head, where the checkpoint has none.

    Raises:
        WeightsError: the checkpoint or the adapter is damaged or does not fit.
        ConfigError: the statistics are not those of the model's actions, or the disk is too small.
        ShardingError: there are not so many devices, or the model cannot be cut over them.
        FileExistsError: there is something at `to`.
        KeyboardInterrupt: also where SIGINT or SIGTERM came while it saved.
    """
    base = open_base(source)
    adapters = None if adapter is None else open_adapter(adapter, base)
    config = _configure(base, adapters, dtype)
    folders = [] if adapter is None else [adapter]
    norm_stats = read_norm_stats(source, *folders, unnorm_key=unnorm_key, state_dim=config.state_dim)
    with user_input():
        policy = make_policy(config, norm_stats)
    like = abstract_params(policy, make_mesh(fsdp=fsdp, tensor=tensor))
    check_space(to, num_bytes(like))
    with new_directory(to) as partial:
        left = keep_aside(source, base.unused, partial / KEPT)
        left += [] if adapters is None else keep_adapter(adapters, partial / KEPT)
        params = _read_params(source, adapters, config, like, jax.random.key(seed))
        save_converted(partial, params, config, norm_stats)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Imported(config, num_params, num_bytes(params), len(base.unused), tuple(left))


def _configure(base: Base, adapter: Adapter | None, dtype: str | None) -> OpenVLAConfig:
    """Returns the configuration of the model with its adapters, in the type its parameters are to have."""
    dtype = dtype or next(iter(base.tensors.values())).spec.dtype
    if dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")
    execution = dataclasses.replace(base.config.execution, dtype=dtype, param_dtype=dtype)
    lora = None if adapter is None else adapter.lora
    return dataclasses.replace(base.config, execution=execution, lora=lora)


def _read_params(source: Path, adapter: Adapter | None, config: OpenVLAConfig, like: PyTree, key: jax.Array) -> PyTree:
    """Reads the base model, the value head and the adapters, each leaf onto its devices."""
    with progress_bytes(num_bytes(like), f"read {source.name}") as on_bytes:
        load = {"config": config, "like": drop_adapters(like), "on_bytes": on_bytes}
        params = load_openvla_params(source, key, **load)
        if adapter is None:
            return params
        wanted = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
        if (adapter.folder / VALUE_HEAD).exists():
            params |= load_value_head(adapter.folder, key, config=config, wanted=wanted)
        return add_adapters(params, read_tree(adapter.table, adapter.tensors, wanted, on_bytes))
