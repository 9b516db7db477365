"""From a converted folder, or a phase of a run, to weights of pi0.5 as openpi, its port or lerobot reads them."""

from pathlib import Path
from typing import NamedTuple

import jax

from stare_jax.config import ConfigError, from_dict
from stare_jax.logging import new_directory, progress_bytes
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.runs.load import load_config
from stare_jax.state.checkpoint import load_model, load_norm_stats, param_shapes, resolve_step
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.storage import save_tree
from stare_jax.state.train_state import CHECKPOINTS
from stare_jax.weights.folders import check_space
from stare_jax.weights.openvla.export import widest_dtype
from stare_jax.weights.pi05.export import (
    adapter_paths,
    check_counterpart,
    leaf_order,
    merged_leaves,
    openpi_tree,
    port_specs,
    write_heads,
    write_port,
    write_stats,
)
from stare_jax.weights.pi05.port import LEROBOT
from stare_jax.weights.pi05.read import OPENPI, PALIGEMMA, PORT
from stare_jax.weights.pi05.side_files import Kept, copy_assets, copy_side_files, open_kept
from stare_jax.weights.safetensors_folder import read_json
from stare_jax.weights.tensor_table import FLOATS

FORMS = (OPENPI, PORT, LEROBOT)


class Source(NamedTuple):
    """Parameters that are to be exported."""

    checkpoints: Path
    step: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    """of the parameters, by path."""
    config: Pi05Config
    name: str
    """of a run's statistics; empty for a converted folder, which brings its own."""
    kept: Kept | None
    """what a converted folder keeps of the checkpoint that it was."""


def export_pi05(
    source: Path,
    to: Path,
    *,
    form: str | None = None,
    step: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    stats_name: str | None = None,
    max_bytes: int | None = None,
) -> str:
    """Converts a converted folder or a phase of a run; the result is there when it is complete, or not at all.

    Args:
        source: `<run>/<phase>`, or a folder that `import_pi05` made.
        to: a new folder.
        form: "openpi", "safetensors" (of openpi's PyTorch port) or "lerobot"; None takes that which a converted folder
            came in, and else openpi's.
        step: which checkpoint; None takes the latest.
        merge: put adapters into the weights.
        dtype: of the weights; None rounds nothing.
        stats_name: asset id of the run's statistics; None takes its environment's name.
        max_bytes: of one file of safetensors; None writes one, which is all that the others read.

    Returns:
        The format that was written.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: adapters are not to be merged, or there are none; the disk is too small.
        WeightsError: the model has parts that openpi's does not have.
        FileExistsError: there is something at `to`.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")
    origin = find_source(source, step)
    form = form or (origin.kept.form if origin.kept and origin.kept.form != PALIGEMMA else OPENPI)
    if form not in FORMS:
        raise ConfigError(f"to_format: got {form!r}, expected one of {FORMS}")
    check_counterpart(origin.config)
    adapted = adapter_paths(origin.shapes)
    if merge and not adapted:
        raise ConfigError("merge: got True, expected False for parameters without adapters")
    if adapted and not merge:
        raise ConfigError(f"merge: got False, expected True for parameters with {len(adapted) // 2} adapters")
    with new_directory(to) as partial:
        _write(partial, origin, form, adapted, dtype=dtype, max_bytes=max_bytes)
        _write_beside(partial, origin, form, stats_name)
    return form


def find_source(source: Path, step: int | None) -> Source:
    """Finds the parameters of a converted folder, or a phase of a run, and their configuration.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: the folder above is no run's.
    """
    checkpoints = source / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    stored = (checkpoints, step, param_shapes(checkpoints, step=step))
    if kept := open_kept(source):
        config = from_dict(Pi05Config, load_model(checkpoints, step=step), path="model")
        return Source(*stored, config, "", kept)
    run = load_config(source.parent)
    return Source(*stored, run.model, run.env.env_id, None)


def is_pi05_checkpoint(folder: Path) -> bool:
    """Returns whether a folder with checkpoints of ours holds a pi0.5."""
    if open_kept(folder):
        return True
    run = folder.absolute().parent / "config.json"
    description = read_json(run) if run.exists() else {}
    model = description.get("model") if isinstance(description, dict) else None
    return isinstance(model, dict) and "paligemma" in model


def _write(
    partial: Path, origin: Source, form: str, adapted: list[str], *, dtype: str | None, max_bytes: int | None
) -> None:
    """Writes weights and heads, adapters merged where there are any."""
    config, kept = origin.config, origin.kept
    dtypes = dtype or widest_dtype({path: leaf for path, leaf in origin.shapes.items() if path not in set(adapted)})
    if dtype is None and kept and kept.dtypes and (kept.form == OPENPI) == (form == OPENPI):
        dtypes = kept.dtypes
    leaves = leaf_loader(origin.checkpoints, leaf_order(config, set(adapted)), step=origin.step)
    if adapted:
        leaves = merged_leaves(leaves, set(adapted), config.lora)
    write_heads(partial, config, leaves)
    size = sum(spec.num_bytes for spec in port_specs(config, dtypes if isinstance(dtypes, str) else "float32").values())
    check_space(partial, size)
    with progress_bytes(size, "write") as on_bytes:
        if form == OPENPI:
            save_tree(partial, "params", openpi_tree(config, leaves, dtypes, on_bytes))
        else:
            options = {"form": form, "dtypes": dtypes, "max_bytes": max_bytes, "on_bytes": on_bytes}
            write_port(partial, config, leaves, **options)


def _write_beside(partial: Path, origin: Source, form: str, stats_name: str | None) -> None:
    """Writes the files beside the weights: those that were kept, and a run's statistics."""
    if origin.kept is None:
        write_stats(partial, stats_name or origin.name, load_norm_stats(origin.checkpoints, step=origin.step))
    elif origin.kept.form == form:
        copy_side_files(origin.kept.folder, partial)
    else:
        copy_assets(origin.kept.folder, partial)
