"""Export: a converted folder, or a phase of a run, becomes a folder of weights as other programs read them."""

import itertools
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.config import ConfigError
from stare_jax.logging import new_directory, progress, progress_bytes
from stare_jax.models import ModelConfig
from stare_jax.models.nn.lora import LoRAConfig, merge_adapters
from stare_jax.state.checkpoint import load_norm_stats, param_shapes, resolve_step
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.train_state import CHECKPOINTS
from stare_jax.types import NormStats
from stare_jax.weights import heads, peft, side_files
from stare_jax.weights.files import Spec, WeightsError, read, read_json, write_file, write_model
from stare_jax.weights.format import Format, Opened
from stare_jax.weights.formats import FORMATS, OPENVLA, PALIGEMMA, check_counterpart, open_weights
from stare_jax.weights.importing import check_dtype, check_space
from stare_jax.weights.load import check_same_model, is_converted, model_from_dict, stored_model
from stare_jax.weights.statistics import read_openvla_stats, read_openvla_tables, write_openvla_tables
from stare_jax.weights.tensor_table import (
    Leaves,
    adapted_module,
    adapter_names,
    is_adapter,
    read_leaf,
    table_specs,
    table_values,
)


class Origin(NamedTuple):
    """Parameters that are to be exported, and what is known of the checkpoint that they began as."""

    checkpoints: Path
    step: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    """shapes of the parameters, by path"""
    config: ModelConfig
    is_run: bool
    base: Opened | None
    """the checkpoint that they began as, or what is kept of it"""
    base_folder: Path

    @property
    def adapted(self) -> list[str]:
        """Paths of the adapters."""
        return [path for path in self.shapes if is_adapter(path)]

    def leaves(self, paths: Sequence[str]) -> Leaves:
        """Returns the parameters, to be asked for in this order, each before its adapters, and heads first."""
        order = [*heads.head_table(self.config)]
        for path in paths:
            order += [path, *(name for name in adapter_names(path) if name in self.shapes)]
        return leaf_loader(self.checkpoints, list(dict.fromkeys(order)), step=self.step)


def export_weights(
    source: Path,
    to: Path,
    *,
    model: ModelConfig | None = None,
    base: Path | None = None,
    form: str | None = None,
    step: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    stats_name: str | None = None,
    max_bytes: int | None = None,
) -> str:
    """Converts parameters to a new folder, which is there when it is complete, or not at all.

    A policy of OpenVLA with adapters gives the adapter alone, as PEFT has it, one of pi0.5 openpi's tree with adapters
    in it; `merge` puts them into the weights.

    Args:
        source: `<run>/<phase>`, or a folder that `import_weights` made.
        to: the folder.
        model: configuration of the run's model, for phases whose checkpoints do not have it.
        base: OpenVLA's checkpoint that the policy began as, in Hugging Face's form or converted, which gives what our
            parameters do not have; None takes the source, if it is converted.
        form: for pi0.5 "openpi", "safetensors" (of its PyTorch port) or "lerobot"; None takes the format that a
            converted folder came in, and openpi's for a run.
        step: step of the checkpoint; None takes the latest.
        merge: put adapters into the weights.
        dtype: type of the tensors; None rounds nothing.
        stats_name: name of a run's statistics among those of data sets; None takes that of the run's folder.
        max_bytes: size of one file of safetensors; None takes what the format's own programs write.

    Returns:
        "adapter", or the name of the format that was written.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: there is no base or no configuration, or no adapters to merge; the disk is too small.
        WeightsError: the base is damaged or of another model, or its weights are not those beside the adapters.
        FileExistsError: there is something at `to`.
    """
    check_dtype(dtype)
    origin = _find_origin(source, base, step, model)
    written = _choose_form(origin, form)
    check_counterpart(origin.config, written)
    as_adapter = _check_adapters(origin, written, merge=merge)
    stats_name = stats_name or source.resolve().parent.name
    stats = load_norm_stats(origin.checkpoints, step=origin.step)
    if origin.is_run and written is OPENVLA:
        _check_name(origin.base.folder, stats_name, stats)
    with new_directory(to) as partial:
        if as_adapter:
            _write_adapter(partial, origin, dtype)
        else:
            _write_model(partial, origin, written, merge=merge, dtype=dtype, max_bytes=max_bytes)
        if origin.is_run:
            written.add_statistics(partial, stats_name, stats)
    return "adapter" if as_adapter else written.name


def _find_origin(source: Path, base: Path | None, step: int | None, model: ModelConfig | None) -> Origin:
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
    """Opens a checkpoint of others, or what a converted folder keeps of one, which has no tensors of the parameters."""
    if not is_converted(folder):
        return open_weights(folder)
    kept = next(folder / form.kept for form in FORMATS if (folder / form.kept).is_dir())
    record, unused = read_json(kept / side_files.RECORD), side_files.kept_unused(kept)
    form = next(form for form in FORMATS if form.name == record["form"])
    config = OPENVLA.read_config(kept) if form is OPENVLA else model_from_dict(stored_model(folder))
    dtypes = {name: stored.spec.dtype for name, stored in unused.items()} or record["dtypes"]
    return Opened(form, kept, config, {}, {}, unused, dtypes)


def _choose_form(origin: Origin, form: str | None) -> Format:
    """Returns the format to write: the one asked for, that in which the source came, or the model's first."""
    forms = {f.name: f for f in reversed(FORMATS) if f.model is type(origin.config) and f is not PALIGEMMA}
    if not forms:
        raise WeightsError(f"got a {type(origin.config).__name__}, expected a model that others have a format for")
    if form is not None and form not in forms:
        raise ConfigError(f"to_format: got {form!r}, expected one of {tuple(forms)}")
    came = origin.base.form.name if origin.base is not None else None
    chosen = forms.get(form or came) or next(iter(forms.values()))
    if chosen.keeps_unused and origin.base is None:
        raise ConfigError("base: got none, expected the OpenVLA checkpoint that the policy began as (--base)")
    return chosen


def _check_adapters(origin: Origin, form: Format, *, merge: bool) -> bool:
    """Makes sure that adapters can be written as is wanted; returns whether they are written alone."""
    lora = origin.config.lora
    if merge and not origin.adapted:
        raise ConfigError("merge: got True, expected False for parameters without adapters")
    if merge or not origin.adapted:
        return False
    if form is OPENVLA and lora.overrides:
        raise ConfigError("merge: got False, expected True for adapters of several ranks, which are not written alone")
    if form is not OPENVLA and form.write_tree is None:
        raise ConfigError(f"merge: got False, expected True for parameters with {len(origin.adapted) // 2} adapters")
    if form is not OPENVLA and any(lora.scale_of(adapted_module(path)) != 1.0 for path in origin.adapted):
        raise ConfigError(f"merge: got False, expected True: an alpha of {lora} is not the rank, as openpi's is")
    return form is OPENVLA


def _check_name(folder: Path, name: str, stats: NormStats) -> None:
    """Makes sure that the name of a run's statistics is not that of another data set's."""
    folders = [folder, folder / side_files.ADAPTER]
    if name in read_openvla_tables(folders):
        _, known = read_openvla_stats(folders, name, state_dim=len(stats.state_q01))
        if not all(map(np.array_equal, known, stats)):
            raise ConfigError(f"stats_name: got {name!r}, of which the checkpoint has others, expected a new name")


def _write_adapter(partial: Path, origin: Origin, dtype: str | None) -> None:
    """Writes OpenVLA's adapters alone, and the value head."""
    if origin.is_run:
        _check_unchanged(origin)
        dtype = dtype or "float32"  # in which they are trained, whatever they came in
    heads.write_heads(partial, origin.config, origin.leaves(()))
    leaves = leaf_loader(origin.checkpoints, origin.adapted, step=origin.step)
    peft.write_adapter(partial, origin.base, origin.config, leaves, adapted=origin.adapted, dtype=dtype)


def _check_unchanged(origin: Origin) -> None:
    """Raises WeightsError, with the parameters' paths, unless the weights beside the adapters are the base's."""
    base, table, changed = origin.base, OPENVLA.table(origin.config, ()), []
    leaves = leaf_loader(origin.checkpoints, list(table), step=origin.step)
    stored = None if base.tensors else leaf_loader(origin.base_folder / CHECKPOINTS, list(table))
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
        got = f"got other weights than those beside the adapters in {', '.join(changed)}"
        raise WeightsError(f"{origin.base_folder}: {got}, expected the same; --merge writes the whole model")


def _write_model(
    partial: Path, origin: Origin, form: Format, *, merge: bool, dtype: str | None, max_bytes: int | None
) -> None:
    """Writes the whole model, adapters merged where that is wanted, and what is beside it."""
    config, base, adapted = origin.config, origin.base, origin.adapted
    table = form.table(config, () if merge else adapted)
    dtypes = dtype or _widest(origin.shapes)
    has_same_names = base is not None and (base.form.write_tree is None) == (form.write_tree is None)
    if dtype is None and has_same_names and not form.one_dtype:
        dtypes = base.dtypes or dtypes
    specs = table_specs(table, origin.shapes, dtypes)
    unused = form.unused(config, next(iter(specs.values())).dtype)
    size = sum(spec.num_bytes for spec in (specs | unused).values())
    check_space(partial, size if form.write_tree is None else 2 * size)
    leaves, kept = origin.leaves(list(table)), None
    if merge:
        leaves = _merged(leaves, set(adapted), config.lora)
        kept = peft.kept_adapter(base, config, adapted) if form is OPENVLA else None
    if form is OPENVLA or (base is not None and base.form.name == form.name):
        side_files.copy_side_files(base.folder, partial)
    elif base is not None and (base.folder / side_files.ASSETS).is_dir():
        shutil.copytree(base.folder / side_files.ASSETS, partial / side_files.ASSETS)
    form.finish(partial, config, dtypes if form.one_dtype and dtypes != base.dtype else None)
    heads.write_heads(partial, config, leaves)
    with progress_bytes(size, "write") as on_bytes:
        values = table_values(table, leaves, specs, prefix=form.prefix)
        if form.write_tree is not None:
            form.write_tree(partial, values, on_bytes)
        else:
            values = itertools.chain(values, _unused_values(form, base, unused, kept, config))
            named = {form.prefix + name: spec for name, spec in (specs | unused).items()}
            if max_bytes := max_bytes or form.max_bytes:
                write_model(partial, named, values, max_bytes=max_bytes, on_bytes=on_bytes)
            else:
                write_file(partial / "model.safetensors", named, values, on_bytes)
    if kept is not None and (tables := read_openvla_tables([kept])):
        write_openvla_tables(partial, tables)


def _widest(shapes: dict[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the type in which no parameter that a checkpoint of others holds is rounded."""
    own = ("value_head/", "noise_head/")
    dtypes = {leaf.dtype.name for path, leaf in shapes.items() if not (is_adapter(path) or path.startswith(own))}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _unused_values(
    form: Format, base: Opened | None, unused: dict[str, Spec], kept: Path | None, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that are never run: those that are kept, with a kept adapter merged, or zeros."""
    adapters = side_files.kept_unused(kept)
    for name, spec in unused.items():
        dtype, module = jnp.dtype(spec.dtype), name.removesuffix(".weight")
        tensor = read(base.unused[name]) if form.keeps_unused else np.broadcast_to(np.zeros((), dtype), spec.shape)
        if f"{module}.lora_A.weight" in adapters:
            a, b = (read(adapters[f"{module}.{which}.weight"]) for which in ("lora_A", "lora_B"))
            tensor = _merge(tensor.T, a.T, b.T, config.lora).T
        yield form.prefix + name, tensor.astype(dtype, copy=False)


def _merged(leaves: Leaves, adapted: Collection[str], lora: LoRAConfig) -> Leaves:
    """Returns parameters of the base model that compute the same as `leaves` with adapters at the paths `adapted`."""

    def merged(path: str) -> np.ndarray:
        names, kernel = adapter_names(path), leaves(path)
        if names[0] not in adapted:
            return kernel
        a, b = map(leaves, names)
        own = LoRAConfig(rank=a.shape[-1], alpha=lora.scale_of(adapted_module(path)) * a.shape[-1])
        if path.endswith("/kernel") and a.ndim + b.ndim == kernel.ndim + 2:
            return _merge(kernel, a, b, own)
        kernel = np.require(kernel, requirements="W")
        for i in range(len(kernel)):  # layer by layer, because the sum is taken in float32
            kernel[i] = _merge(kernel[i], a[i], b[i], own, name="kernel" if path.endswith("/kernel") else "w")
        return kernel

    return merged


def _merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, lora: LoRAConfig, *, name: str = "kernel") -> np.ndarray:
    params = {"module": {name: kernel, "lora_a": a, "lora_b": b}}
    return jax.device_get(_merge_adapters(params, config=lora)["module"][name])


_merge_adapters = jax.jit(merge_adapters, static_argnames="config")
