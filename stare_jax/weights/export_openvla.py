"""From a converted folder, or a phase of a run, to a checkpoint as transformers, or an adapter as PEFT, reads it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.config import ConfigError, from_dict
from stare_jax.logging import new_directory, progress, progress_bytes
from stare_jax.models import OpenVLAConfig
from stare_jax.runs.load import load_config
from stare_jax.state.checkpoint import load_model, load_norm_stats, param_shapes, resolve_step
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.train_state import CHECKPOINTS
from stare_jax.weights.folders import check_space
from stare_jax.weights.openvla.config import CONFIG, read_norm_stats, read_statistics, to_statistics
from stare_jax.weights.openvla.export import (
    add_statistics,
    check_counterpart,
    export_specs,
    merged_leaves,
    widest_dtype,
    write_openvla,
    write_value_head,
)
from stare_jax.weights.openvla.side_files import ADAPTER, KEPT, Base, open_base
from stare_jax.weights.openvla.table import tensor_table, value_head_table
from stare_jax.weights.peft import kept_adapter, merge_kept, module_of, write_adapter
from stare_jax.weights.safetensors_folder import WeightsError
from stare_jax.weights.tensor_table import FLOATS, Leaves, read_leaf

_MAX_CHAIN = 100
DEFAULT_SHARD_BYTES = 5 * 10**9


class Source(NamedTuple):
    """Parameters that are to be exported."""

    checkpoints: Path
    step: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    """of the parameters, by path."""
    config: OpenVLAConfig
    name: str
    """of the run's statistics among those of data sets; empty for a converted folder, which brings its own."""
    base: Base
    base_folder: Path
    """of the checkpoint that they began as, in Hugging Face's format or converted."""


def export_openvla(
    source: Path,
    to: Path,
    *,
    base: Path | None = None,
    step: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    stats_name: str | None = None,
    max_bytes: int = DEFAULT_SHARD_BYTES,
) -> str:
    """Converts a converted folder or a phase of a run; the result is there when it is complete, or not at all.

    What our parameters do not have comes from the checkpoint that they began as. A policy with adapters gives the
    adapter alone, or the whole model with the adapters in its weights.

    Args:
        source: `<run>/<phase>`, or a folder that `import_openvla` made.
        to: a new folder.
        base: the checkpoint that the policy began as, in Hugging Face's format or converted; None follows the run's
            `init_from`.
        step: which checkpoint; None takes the latest.
        merge: put the adapters into the weights.
        dtype: of the tensors; None rounds nothing.
        stats_name: under which the run's statistics go among those of the data sets; None takes its environment's.
        max_bytes: of one file.

    Returns:
        What was written: "adapter" or "model".

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: there is no base, or nothing to merge, or the disk is too small.
        WeightsError: the run's model is not the base's; the base's weights are not those beside the adapters.
        FileExistsError: there is something at `to`.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")
    origin = find_source(source, base, step)
    check_counterpart(origin.config, origin.base)
    adapted = adapter_paths(origin.shapes)
    if merge and not adapted:
        raise ConfigError("merge: got True, expected False for parameters without adapters")
    statistics = _run_statistics(origin, stats_name or origin.name) if origin.name else {}
    with new_directory(to) as partial:
        if adapted and not merge:
            _write_adapter(partial, origin, dtype=dtype)
        else:
            _write_model(partial, origin, dtype=dtype, max_bytes=max_bytes)
        if not statistics.keys() <= read_statistics([partial]).keys():
            add_statistics(partial, statistics)
    return "adapter" if adapted and not merge else "model"


def find_source(source: Path, base: Path | None, step: int | None) -> Source:
    """Finds the parameters of a converted folder, or a phase of a run, their configuration and where they came from.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: there is nothing that says what it came from.
        WeightsError: what it came from is damaged.
    """
    base = None if base is None else find_base(base)
    checkpoints = source / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    stored = (checkpoints, step, param_shapes(checkpoints, step=step))
    if (source / KEPT).is_dir():
        model = from_dict(OpenVLAConfig, load_model(checkpoints, step=step), path="model")
        return Source(*stored, model, "", open_base(base or source), base or source)
    run = load_config(source.parent)
    base = base or find_base(source)
    return Source(*stored, run.model, run.env.env_id, open_base(base), base)


def find_base(folder: Path) -> Path:
    """Returns the checkpoint, in Hugging Face's format or converted, that a phase of a run began as.

    Args:
        folder: the phase's, or that checkpoint itself.

    Raises:
        ConfigError: a run began from random weights, or from a folder that is not there.
    """
    given, advice = folder, "--base names the OpenVLA checkpoint that it began as"
    for _ in range(_MAX_CHAIN):
        if (folder / KEPT).is_dir() or ((folder / CONFIG).exists() and not (folder / CHECKPOINTS).is_dir()):
            return folder
        if not folder.is_dir():
            raise ConfigError(f"{given}: began as {folder}, which is not there; {advice}")
        init_from = load_config(folder.parent).init_from
        if not init_from:
            raise ConfigError(f"{given}: began from random weights, expected an OpenVLA checkpoint; {advice}")
        folder = Path(init_from)
    raise ConfigError(f"{given}: began as itself, expected an OpenVLA checkpoint; {advice}")


def adapter_paths(paths: Iterable[str]) -> list[str]:
    """Returns those of parameters' paths that are adapters'."""
    return [path for path in paths if path.endswith(("/lora_a", "/lora_b"))]


def _leaves(origin: Source) -> Leaves:
    """Returns the parameters, to be asked for in the order in which they are written."""
    order = [*value_head_table(origin.config)]
    for path in tensor_table(origin.config):
        beside = [f"{module_of(path)}/{name}" for name in ("lora_a", "lora_b")] if path.endswith("/kernel") else []
        order += [path, *(name for name in beside if name in origin.shapes)]
    return leaf_loader(origin.checkpoints, order, step=origin.step)


def _write_adapter(partial: Path, origin: Source, *, dtype: str | None) -> None:
    """Writes the adapters alone, and the value head."""
    if origin.name:
        check_unchanged(origin)
        dtype = dtype or "float32"  # in which they are trained, whatever they came in
    adapted = adapter_paths(origin.shapes)
    write_value_head(partial, origin.config, _leaves(origin))
    leaves = leaf_loader(origin.checkpoints, [*adapted, *tensor_table(origin.config)], step=origin.step)
    write_adapter(partial, origin.base, origin.config, leaves, adapted=adapted, dtype=dtype)


def check_unchanged(origin: Source) -> None:
    """Makes sure that the weights beside the adapters are the base's, so that the adapter alone is the policy.

    Raises:
        WeightsError: names the parameters that differ.
    """
    base, table, changed = origin.base, tensor_table(origin.config), []
    leaves, stored = leaf_loader(origin.checkpoints, list(table), step=origin.step), None
    if not base.tensors:
        stored = leaf_loader(origin.base_folder / CHECKPOINTS, list(table))
    with progress(len(table), "check base", "parameter") as bar:
        for path, entry in table.items():
            ours = leaves(path)
            if stored is None:
                theirs = read_leaf(entry, jax.ShapeDtypeStruct(ours.shape, ours.dtype), base.tensors)
            else:
                theirs = stored(path).astype(ours.dtype)
            if not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):  # bits, as NaN is not equal to itself
                changed.append(path)
            bar.update(1)
    if changed:
        raise WeightsError(
            f"{origin.base_folder}: got other weights than those beside the adapters in {', '.join(changed)}, expected "
            "the same; --merge writes the whole model"
        )


def _write_model(partial: Path, origin: Source, *, dtype: str | None, max_bytes: int) -> None:
    """Writes the whole model, adapters merged where there are any."""
    config, leaves, adapted = origin.config, _leaves(origin), adapter_paths(origin.shapes)
    dtype = dtype or widest_dtype(origin.shapes)
    num_bytes = sum(spec.num_bytes for spec in export_specs(config, dtype).values())
    check_space(partial, num_bytes)
    with progress_bytes(num_bytes, "write") as on_bytes:
        options = {"dtype": dtype, "max_bytes": max_bytes, "on_bytes": on_bytes}
        if adapted:
            leaves = merged_leaves(leaves, adapted, config.lora)
            options["merge_unused"] = merge_kept(kept_adapter(origin.base, config, adapted), config.lora)
        write_openvla(partial, origin.base, config, leaves, **options)
    if adapted and (statistics := read_statistics([origin.base.folder / ADAPTER])):
        add_statistics(partial, statistics)


def _run_statistics(origin: Source, name: str) -> dict[str, Any]:
    """Returns the statistics of a run under their name, having made sure that it is no other data set's."""
    stats, folders = load_norm_stats(origin.checkpoints, step=origin.step), [origin.base.folder]
    folders.append(origin.base.folder / ADAPTER)
    if name in read_statistics(folders):
        known = read_norm_stats(*folders, unnorm_key=name, state_dim=len(stats.state_q01))
        if not all(map(np.array_equal, known, stats)):
            raise ConfigError(f"stats_name: got {name!r}, of which the checkpoint has others, expected a new name")
    return {name: to_statistics(stats)}
