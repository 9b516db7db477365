"""From weights of pi0.5 in the formats of others to a folder that a run can start from."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import jax

from stare_jax.config import ConfigError, user_input
from stare_jax.logging import new_directory, progress_bytes
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.presets import pi05_base
from stare_jax.models.pi05.prompt import STATELESS_TEMPLATE
from stare_jax.sharding.mesh import make_mesh, path_name
from stare_jax.state.storage import load_leaf, tree_shapes
from stare_jax.state.train_state import abstract_params, num_bytes
from stare_jax.types import NormStats
from stare_jax.weights.folders import check_space, save_converted
from stare_jax.weights.pi05.export import check_counterpart
from stare_jax.weights.pi05.files import list_tensors, tree_folder
from stare_jax.weights.pi05.npz import is_npz
from stare_jax.weights.pi05.read import Weights, load_weights, open_openpi, open_paligemma, open_port, with_heads
from stare_jax.weights.pi05.side_files import KEPT, keep_aside
from stare_jax.weights.pi05.statistics import find_stats, read_openpi_stats
from stare_jax.weights.safetensors_folder import WeightsError
from stare_jax.weights.tensor_table import FLOATS

_NOISE = ("Metadata file does not exist", "Failed to resolve handler for checkpointable")
# Orbax says so of every leaf where a tree was copied without the file that was beside it.
logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(_NOISE))


class ImportedPi05(NamedTuple):
    """What came of an import."""

    form: str
    """see `pi05.Weights`."""
    config: Pi05Config
    asset_id: str | None
    """whose statistics the policy has; None where there were none."""
    num_params: int
    num_bytes: int
    """of the parameters."""
    num_fresh: int
    """parameters that the source does not have, and that begin with random values."""
    left: tuple[str, ...]
    """names of files, and of tensors, that were not taken along."""


def open_weights(source: Path, *, config: Pi05Config | None = None) -> Weights:
    """Finds weights of pi0.5 by what is in a folder or file, and compares them with what the configuration asks for.

    Args:
        source: openpi's checkpoint, the safetensors of its PyTorch port or of lerobot, or PaliGemma's npz file.
        config: what the model has to be; None takes its sizes from the weights, and the rest from `pi05_base`.

    Raises:
        WeightsError: there are none, or they do not fit, or the model has parts that openpi's does not have.
    """
    if config is not None:
        check_counterpart(config)
    base = config or pi05_base()
    if is_npz(source):
        return open_paligemma(source, base=base, config=config)
    tensors, folder = list_tensors(source), tree_folder(source)
    if tensors is not None:
        weights = open_port(source, tensors, base=base, config=config)
    elif folder is not None:
        load = functools.partial(load_leaf, folder)
        weights = open_openpi(source, tree_shapes(folder), load, base=base, config=config)
    else:
        raise WeightsError(f"{source}: got no weights, expected openpi's params, model*.safetensors, or an npz file")
    return with_heads(source, weights, config=config)


def import_pi05(
    source: Path,
    to: Path,
    *,
    unnorm_key: str | None = None,
    action_dim: int | None = None,
    state_dim: int | None = None,
    dtype: str | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 0,
    config: Pi05Config | None = None,
) -> ImportedPi05:
    """Converts weights of pi0.5; the result is there when it is complete, or not at all.

    Args:
        source: see `open_weights`.
        to: a new folder: `checkpoints/0` with the parameters, `openpi` with everything else.
        unnorm_key: asset id of the statistics that the policy has; may be left out where there is only one.
        action_dim: A of the robot, to which longer statistics are cut; None takes them all.
        state_dim: S, likewise; 0 takes the state out of the prompt.
        dtype: of the parameters, adapters and heads apart; None takes the source's.
        fsdp: over how many devices weights are cut while they are read and saved, and `tensor` likewise.
        tensor: see `sharding.make_mesh`.
        seed: of what the source does not have.
        config: what the model has to be, see `open_weights`.

    Raises:
        WeightsError: the weights or the statistics are damaged or do not fit.
        ConfigError: the disk is too small, or the policy refuses the configuration.
        ShardingError: there are not so many devices, or the model cannot be cut over them.
        FileExistsError: there is something at `to`.
        KeyboardInterrupt: also where SIGINT or SIGTERM came while it saved.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")
    weights = open_weights(source, config=config)
    config = _with_dtype(weights.config, dtype)
    asset_id, norm_stats = _read_stats(source, config, unnorm_key, action_dim, state_dim)
    sizes = {"action_dim": len(norm_stats.action_q01), "state_dim": len(norm_stats.state_q01)}
    if not sizes["state_dim"] and "{state}" in config.prompt_template:
        config = dataclasses.replace(config, prompt_template=STATELESS_TEMPLATE)
    with user_input():
        config = dataclasses.replace(config, **sizes)
        policy = make_policy(config, norm_stats)
    like = abstract_params(policy, make_mesh(fsdp=fsdp, tensor=tensor))
    check_space(to, num_bytes(like))
    with new_directory(to) as partial:
        left = keep_aside(source, weights, partial / KEPT)
        with progress_bytes(num_bytes(like), f"read {source.name}") as on_bytes:
            key = jax.random.key(seed)
            params = load_weights(weights, key, config=config, like=like, on_bytes=on_bytes)
        save_converted(partial, params, config, norm_stats)
    sizes = {path_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(params)}
    num_fresh = sum(sizes[path] for path in weights.fresh)
    left = (*left, *weights.left)
    return ImportedPi05(weights.form, config, asset_id, sum(sizes.values()), num_bytes(params), num_fresh, left)


def _with_dtype(config: Pi05Config, dtype: str | None) -> Pi05Config:
    if dtype is None:
        return config
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, dtype=dtype, param_dtype=dtype))


def _read_stats(
    source: Path, config: Pi05Config, asset_id: str | None, action_dim: int | None, state_dim: int | None
) -> tuple[str | None, NormStats]:
    """Returns asset id and statistics; where there are none, those under which everything is as it is."""
    found = find_stats(source, asset_id)
    if found is None:
        sizes = (action_dim, config.action_dim), (state_dim, config.state_dim)
        return None, identity_stats(*(default if given is None else given for given, default in sizes))
    asset_id, file = found
    sizes = {"max_dim": config.model_action_dim, "action_dim": action_dim, "state_dim": state_dim}
    return asset_id, read_openpi_stats(file, **sizes)
