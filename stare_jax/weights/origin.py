"""Parameters of ours that are to be exported, and what is known of the checkpoint that they began as."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.config import ConfigError
from stare_jax.logging import progress
from stare_jax.models import ModelConfig
from stare_jax.state.checkpoint import param_shapes, resolve_step
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.train_state import CHECKPOINTS
from stare_jax.weights.format import Opened, check_counterpart
from stare_jax.weights.formats import FORMATS, OPENVLA, open_weights
from stare_jax.weights.heads import head_table
from stare_jax.weights.load import check_same_model, is_converted, model_from_dict, stored_model
from stare_jax.weights.safetensors_folder import WeightsError, list_file, read_json
from stare_jax.weights.side_files import RECORD, UNUSED
from stare_jax.weights.tensor_table import Leaves, adapter_names, is_adapter, read_leaf


class Origin(NamedTuple):
    """Parameters that are to be exported."""

    checkpoints: Path
    step: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    """shapes of the parameters, by path"""
    config: ModelConfig
    is_run: bool
    base: Opened | None
    """files and tensors that are kept of the checkpoint that they began as"""
    base_folder: Path

    @property
    def adapted(self) -> list[str]:
        """Paths of the adapters."""
        return [path for path in self.shapes if is_adapter(path)]

    def leaves(self, paths: Sequence[str]) -> Leaves:
        """Returns the parameters, to be asked for in this order, each before its adapters, and heads first."""
        order = [*head_table(self.config)]
        for path in paths:
            order += [path, *(name for name in adapter_names(path) if name in self.shapes)]
        return leaf_loader(self.checkpoints, list(dict.fromkeys(order)), step=self.step)


def find_origin(source: Path, base: Path | None, step: int | None, model: ModelConfig | None) -> Origin:
    """Finds parameters, their configuration and what is kept of the checkpoint that they began as."""
    checkpoints = source / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    fields, converted = stored_model(source, step=step), is_converted(source)
    if not fields and model is None:
        raise ConfigError(f"{source}: got a checkpoint without its model's configuration, expected it in `model`")
    config = model_from_dict(fields) if fields else model
    base = base or (source if converted else None)
    opened = None if base is None else open_base(base)
    if opened is not None and opened.form is OPENVLA:
        check_counterpart(config, OPENVLA)
        check_same_model(OPENVLA.known(opened.folder), config, source=base)
    shapes = param_shapes(checkpoints, step=step)
    return Origin(checkpoints, step, shapes, config, not converted, opened, base or source)


def open_base(folder: Path) -> Opened:
    """Opens a checkpoint of others, or what a converted folder keeps of one, which has no tensors of the parameters.

    Raises:
        ConfigError, WeightsError: see `open_weights`.
    """
    if not is_converted(folder):
        return open_weights(folder)
    kept = next(folder / form.kept for form in FORMATS if (folder / form.kept).is_dir())
    record = read_json(kept / RECORD) if (kept / RECORD).exists() else {}  # OpenVLA's, older
    form = next(form for form in FORMATS if form.name == record.get("form", OPENVLA.name))
    config = OPENVLA.read_config(kept) if form is OPENVLA else model_from_dict(stored_model(folder))
    unused = list_file(kept / UNUSED) if (kept / UNUSED).exists() else {}
    dtypes = {name: stored.spec.dtype for name, stored in unused.items()} or dict(record.get("dtypes", {}))
    return Opened(form, kept, config, {}, {}, unused, dtypes)


def check_unchanged(origin: Origin) -> None:
    """Raises WeightsError, with the parameters' paths, unless the weights beside the adapters are the base's."""
    base, table, changed = origin.base, OPENVLA.table(origin.config, ()), []
    leaves, stored = leaf_loader(origin.checkpoints, list(table), step=origin.step), None
    if not base.tensors:
        stored = leaf_loader(origin.base_folder / CHECKPOINTS, list(table))
    with progress(len(table), "check base", "parameter") as bar:
        for path, entry in table.items():
            ours = leaves(path)
            if stored is None:
                theirs = read_leaf(entry, jax.ShapeDtypeStruct(ours.shape, ours.dtype), base.tensors)
            else:
                theirs = stored(path).astype(ours.dtype, copy=False)
            if not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):  # bits, as NaN is not equal to itself
                changed.append(path)
            del ours, theirs  # before the next ones are loaded
            bar.update(1)
    if changed:
        raise WeightsError(
            f"{origin.base_folder}: got other weights than those beside the adapters in {', '.join(changed)}, expected "
            "the same; --merge writes the whole model"
        )
