"""Conversion of checkpoints: from the formats of others to a folder that a run starts from, and back.

Whatever the format, there is one way in and one way out; a result is there when it is complete, or not at all.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stare_jax.config import ConfigError, to_dict, user_input
from stare_jax.logging import Interruption, new_directory, progress, progress_bytes, say
from stare_jax.models import ModelConfig, Policy, make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.checkpoint import load_norm_stats, param_shapes, resolve_step, save_params
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.train_state import CHECKPOINTS, abstract_params, num_bytes
from stare_jax.types import NormStats, PyTree
from stare_jax.weights.format import Format, Opened, check_counterpart, read_params, with_dtype
from stare_jax.weights.formats import FORMATS, OPENVLA, PALIGEMMA, open_weights
from stare_jax.weights.heads import head_table, write_heads
from stare_jax.weights.load import check_same_model, is_converted, model_from_dict, stored_model
from stare_jax.weights.merge import merged_leaves
from stare_jax.weights.openvla.config import merge_statistics, read_norm_stats, read_statistics
from stare_jax.weights.peft import keep_adapter, kept_adapter, merge_kept, open_adapter, write_adapter
from stare_jax.weights.safetensors_folder import Spec, WeightsError, list_file, read, read_json, write_file, write_model
from stare_jax.weights.side_files import (
    ADAPTER,
    ASSETS,
    RECORD,
    UNUSED,
    copy_side_files,
    copy_tokenizer,
    holds_tokenizer,
    keep_aside,
    write_json,
)
from stare_jax.weights.tensor_table import (
    FLOATS,
    Leaves,
    adapted_module,
    adapter_names,
    dtype_of,
    flat_leaves,
    is_adapter,
    read_leaf,
    table_specs,
    table_values,
    with_prefix,
)


class Imported(NamedTuple):
    """Report of an import."""

    form: str
    """name of the format"""
    config: ModelConfig
    stats_name: str | None
    """data set whose statistics the policy has; None where there were none"""
    num_params: int
    num_bytes: int
    num_fresh: int
    """parameters that the source does not have, and that begin with random values"""
    num_unused: int
    """tensors that are never run and are kept aside"""
    left: tuple[str, ...]
    """names of files, and of tensors, that were not taken along"""


class Origin(NamedTuple):
    """Parameters that are to be exported."""

    checkpoints: Path
    step: int
    shapes: dict[str, jax.ShapeDtypeStruct]
    """shapes of the parameters, by path"""
    config: ModelConfig
    is_run: bool
    base: Opened | None
    """what is kept of the checkpoint that they began as"""
    base_folder: Path


def import_weights(
    source: Path,
    to: Path,
    *,
    config: ModelConfig | None = None,
    adapter: Path | None = None,
    unnorm_key: str | None = None,
    action_dim: int | None = None,
    state_dim: int | None = None,
    dtype: str | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 0,
) -> Imported:
    """Converts weights of others to a folder that a run starts from, and that stands alone; see `side_files`.

    Args:
        source: see `open_weights`.
        to: a new folder.
        config: of the model; None takes what the source says.
        adapter: a PEFT folder of OpenVLA's, whose adapters become part of the parameters.
        unnorm_key: data set, or asset, whose statistics the policy has; may be left out where there is only one.
        action_dim: A of the robot, to which longer statistics of openpi's are cut; None takes them all.
        state_dim: S, likewise.
        dtype: of the parameters, adapters and heads apart; None takes the source's.
        fsdp: devices over which weights are cut meanwhile, and `tensor` likewise, see `sharding.make_mesh`; with 1 of
            both they are cut over all devices of the host's processor, since a part is the least that is written at once.
        tensor: see `fsdp`.
        seed: of the parameters that the source does not have.

    Raises:
        WeightsError: weights, adapter or statistics are damaged or do not fit.
        ConfigError: the source does not say which model it is of, or the policy refuses it; the disk is too small.
        ShardingError: there are not so many devices, or the model cannot be cut over them.
        FileExistsError: there is something at `to`.
        KeyboardInterrupt: also where SIGINT or SIGTERM came while it saved.
    """
    _check_dtype(dtype)
    opened = open_weights(source, config=config, adopt_adapters=True)
    form, config = opened.form, with_dtype(opened.config, dtype or opened.dtype)
    if adapter is not None and form is not OPENVLA:
        raise ConfigError(f"adapter: got {adapter}, expected none: {source} is no OpenVLA checkpoint")
    peft = None if adapter is None else open_adapter(adapter, opened)
    folders = [source] if adapter is None else [source, adapter]
    stats_name, norm_stats = form.statistics(
        folders, unnorm_key, action_dim, state_dim if form.for_robot else config.state_dim
    )
    with user_input():
        if peft is not None:
            config, opened = dataclasses.replace(config, lora=peft.lora), opened.join(peft.table, peft.tensors, adapter)
        if norm_stats is None:
            given = [(action_dim, config.action_dim), (state_dim, config.state_dim)]
            norm_stats = identity_stats(*(default if dim is None else dim for dim, default in given))
        if form.for_robot is not None:
            config = form.for_robot(config, len(norm_stats.action_q01), len(norm_stats.state_q01))
        policy = make_policy(config, norm_stats)
    opened = opened._replace(config=config)
    like = _layout(policy, fsdp, tensor)
    check_space(to, num_bytes(like))
    with new_directory(to) as partial:
        kept = partial / form.kept
        dtypes = opened.dtypes if not form.one_dtype and len(set(opened.dtypes.values())) > 1 else {}
        left = keep_aside(source, opened.unused, {"form": form.name, "dtypes": dtypes}, kept)
        left += [] if peft is None else keep_adapter(peft, kept)
        with progress_bytes(num_bytes(like), f"read {source.name}") as on_bytes:
            params = read_params(opened, jax.random.key(seed), like=like, on_bytes=on_bytes)
        config = _keep_tokenizer(config, source, partial, kept)
        _save(partial, params, config, norm_stats)
    sizes = {path: leaf.size for path, leaf in flat_leaves(params).items()}
    fresh = sum(sizes[path] for path in opened.fresh)
    left = (*left, *opened.left)
    counts = sum(sizes.values()), num_bytes(params), fresh, len(opened.unused)
    return Imported(form.name, config, stats_name, *counts, left)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")


def _layout(policy: Policy, fsdp: int, tensor: int) -> PyTree:
    """Returns shapes and shardings of the parameters while they are converted."""
    if fsdp * tensor > 1:
        return abstract_params(policy, make_mesh(fsdp=fsdp, tensor=tensor))
    devices = jax.local_devices(backend="cpu")
    mesh = Mesh(np.array(devices), ("part",))

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % len(devices) == 0]
        whole = SingleDeviceSharding(devices[0])
        sharding = NamedSharding(mesh, P(*[None] * axes[0], "part")) if axes else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, jax.eval_shape(policy.init, jax.random.key(0)))


def _keep_tokenizer(config: ModelConfig, source: Path, partial: Path, kept: Path) -> ModelConfig:
    """Returns a configuration whose tokenizer, if it is a folder, lies in the converted one and is named from there."""
    if holds_tokenizer(kept) or config.tokenizer == str(source):
        return dataclasses.replace(config, tokenizer=kept.name)
    if Path(config.tokenizer).is_dir():
        copy_tokenizer(Path(config.tokenizer), partial / "tokenizer")
        return dataclasses.replace(config, tokenizer="tokenizer")
    return config


def _save(folder: Path, params: PyTree, config: ModelConfig, norm_stats: NormStats) -> None:
    """Saves parameters, configuration and statistics as the checkpoint of a converted folder."""
    say(f"saving {num_bytes(params) / 1e9:.2f} GB")
    with Interruption() as interruption:  # Orbax writes from many threads, which go on when one is interrupted
        save_params(folder / CHECKPOINTS, 0, params, model=to_dict(config), norm_stats=norm_stats)
    if interruption.requested:
        raise KeyboardInterrupt
    write_json(folder / "config.json", {"model": to_dict(config)})


def check_space(to: Path, size: int) -> None:
    """Makes sure that the disk of a path that is to be written has room for a number of bytes.

    Raises:
        ConfigError: it has not.
    """
    parent = next(path for path in to.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ConfigError(f"{parent}: got {free / 1e9:.1f} GB free on its disk, expected at least {size / 1e9:.1f} GB")


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
    """Converts a converted folder, or a phase of a run, to weights as other programs read them.

    A policy of OpenVLA with adapters gives the adapter alone, as PEFT has it, one of pi0.5 openpi's tree with adapters
    in it; `merge` puts them into the weights.

    Args:
        source: `<run>/<phase>`, or a folder that `import_weights` made.
        to: a new folder.
        model: configuration of the run's model, for phases whose checkpoints do not have it.
        base: OpenVLA's checkpoint that the policy began as, in Hugging Face's form or converted, which gives what our
            parameters do not have; None takes the source, if it is converted.
        form: for pi0.5 "openpi", "safetensors" (of its PyTorch port) or "lerobot"; None takes the format that a
            converted folder came in, and openpi's for a run.
        step: of the checkpoints; None takes the latest.
        merge: put adapters into the weights.
        dtype: of the tensors; None rounds nothing.
        stats_name: name of a run's statistics among those of data sets; None takes that of the run's folder.
        max_bytes: of one file of safetensors; None takes what the format's own programs write.

    Returns:
        "adapter", or the name of the format that was written.

    Raises:
        CheckpointError: no such checkpoint.
        ConfigError: there is no base or no configuration, or no adapters to merge; the disk is too small.
        WeightsError: the base is damaged or of another model, or its weights are not those beside the adapters.
        FileExistsError: there is something at `to`.
    """
    _check_dtype(dtype)
    origin = _find_origin(source, base, step, model)
    written = _choose_form(origin, form)
    check_counterpart(origin.config, written)
    adapted = [path for path in origin.shapes if is_adapter(path)]
    if merge and not adapted:
        raise ConfigError("merge: got True, expected False for parameters without adapters")
    as_adapter = bool(adapted) and not merge and written is OPENVLA
    if adapted and not merge and not as_adapter:
        _check_adapters(origin, written, adapted)
    stats_name = stats_name or source.resolve().parent.name
    stats = load_norm_stats(origin.checkpoints, step=origin.step)
    if origin.is_run and written is OPENVLA:
        _check_name(origin, stats_name, stats)
    with new_directory(to) as partial:
        if as_adapter:
            _write_adapter(partial, origin, adapted, dtype)
        else:
            _write_model(partial, origin, written, adapted, merge=merge, dtype=dtype, max_bytes=max_bytes)
        if origin.is_run:
            written.add_statistics(partial, stats_name, stats)
    return "adapter" if as_adapter else written.name


def _find_origin(source: Path, base: Path | None, step: int | None, model: ModelConfig | None) -> Origin:
    """Finds parameters, their configuration and what is kept of the checkpoint that they began as."""
    checkpoints = source / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    fields = stored_model(source, step=step)
    if not fields and model is None:
        raise ConfigError(f"{source}: got a checkpoint without its model's configuration, expected it in `model`")
    config = model_from_dict(fields) if fields else model
    converted = is_converted(source)
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
    record = read_json(kept / RECORD) if (kept / RECORD).exists() else {}  # older ones of OpenVLA have none
    form = next(form for form in FORMATS if form.name == record.get("form", OPENVLA.name))
    config = OPENVLA.read_config(kept) if form is OPENVLA else model_from_dict(stored_model(folder))
    unused = list_file(kept / UNUSED) if (kept / UNUSED).exists() else {}
    dtypes = {name: stored.spec.dtype for name, stored in unused.items()} or dict(record.get("dtypes", {}))
    return Opened(form, kept, config, {}, {}, unused, dtypes)


def _choose_form(origin: Origin, form: str | None) -> Format:
    """Returns the format to write: the one asked for, that in which the source came, or the model's first."""
    forms = [f for f in reversed(FORMATS) if f.model is type(origin.config) and f is not PALIGEMMA]
    if form is not None and form not in [f.name for f in forms]:
        raise ConfigError(f"to_format: got {form!r}, expected one of {tuple(f.name for f in forms)}")
    if not forms:
        raise WeightsError(f"got a {type(origin.config).__name__}, expected a model that others have a format for")
    came = origin.base.form.name if origin.base is not None else None
    chosen = next((f for f in forms if f.name == (form or came)), forms[0])
    if chosen.keeps_unused and origin.base is None:
        raise ConfigError("base: got none, expected the OpenVLA checkpoint that the policy began as (--base)")
    return chosen


def _check_adapters(origin: Origin, written: Format, adapted: Sequence[str]) -> None:
    """Makes sure that adapters can be written as they are."""
    if written.write_tree is None:
        raise ConfigError(f"merge: got False, expected True for parameters with {len(adapted) // 2} adapters")
    lora = origin.config.lora
    if any(lora.scale_of(adapted_module(path)) != 1.0 for path in adapted):
        raise ConfigError(f"merge: got False, expected True: an alpha of {lora} is not the rank, as openpi's is")


def _check_name(origin: Origin, name: str, stats: NormStats) -> None:
    """Makes sure that the name of a run's statistics is not that of another data set's."""
    folders = [origin.base.folder, origin.base.folder / ADAPTER]
    if name in read_statistics(folders):
        known = read_norm_stats(*folders, unnorm_key=name, state_dim=len(stats.state_q01))
        if not all(map(np.array_equal, known, stats)):
            raise ConfigError(f"stats_name: got {name!r}, of which the checkpoint has others, expected a new name")


def _leaves(origin: Origin, paths: Sequence[str]) -> Leaves:
    """Returns the parameters, to be asked for in this order, each before its adapters."""
    order = [*head_table(origin.config)]
    for path in paths:
        order += [path, *(name for name in adapter_names(path) if name in origin.shapes)]
    return leaf_loader(origin.checkpoints, list(dict.fromkeys(order)), step=origin.step)


def _write_adapter(partial: Path, origin: Origin, adapted: Sequence[str], dtype: str | None) -> None:
    """Writes OpenVLA's adapters alone, and the value head."""
    table = OPENVLA.table(origin.config, ())
    if origin.is_run:
        check_unchanged(origin)
        dtype = dtype or "float32"  # in which they are trained, whatever they came in
    write_heads(partial, origin.config, _leaves(origin, ()))
    leaves = leaf_loader(origin.checkpoints, [*adapted, *table], step=origin.step)
    write_adapter(partial, origin.base, origin.config, leaves, adapted=adapted, dtype=dtype)


def check_unchanged(origin: Origin) -> None:
    """Makes sure that the weights beside the adapters are the base's, so that the adapter alone is the policy.

    Raises:
        WeightsError: names the parameters that differ.
    """
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


def _write_model(
    partial: Path,
    origin: Origin,
    form: Format,
    adapted: Sequence[str],
    *,
    merge: bool,
    dtype: str | None,
    max_bytes: int | None,
) -> None:
    """Writes the whole model, adapters merged where that is wanted, and what is beside it."""
    config, base, came_so = origin.config, origin.base, origin.base is not None and origin.base.form.name == form.name
    table = form.table(config, () if merge else adapted)
    dtypes = dtype or _widest(origin.shapes)
    same_names = base is not None and (base.form.write_tree is None) == (form.write_tree is None)
    if dtype is None and same_names and not form.one_dtype and base.dtypes:
        dtypes = base.dtypes
    specs = table_specs(table, {path: origin.shapes[path] for path in table}, dtypes)
    unused = form.unused(config, dtypes if isinstance(dtypes, str) else next(iter(specs.values())).dtype)
    size = sum(spec.num_bytes for spec in (specs | unused).values())
    check_space(partial, size if form.write_tree is None else 2 * size)
    leaves = _leaves(origin, list(table))
    kept = kept_adapter(base, config, adapted) if merge and form is OPENVLA else None
    if merge:
        leaves = merged_leaves(leaves, set(adapted), config.lora)
    if came_so or form is OPENVLA:
        copy_side_files(base.folder, partial)
    elif base is not None and (base.folder / ASSETS).is_dir():
        shutil.copytree(base.folder / ASSETS, partial / ASSETS)
    form.finish(partial, config, dtypes if form.one_dtype and dtypes != base.dtype else None)
    write_heads(partial, config, leaves)
    with progress_bytes(size, "write") as on_bytes:
        if form.write_tree is not None:
            typed = _typed(leaves, dtypes)
            form.write_tree(partial, list(table), typed, on_bytes)
        else:
            table, specs = with_prefix(table, form.prefix), {form.prefix + n: s for n, s in (specs | unused).items()}
            named = dtypes if isinstance(dtypes, str) else {form.prefix + name: value for name, value in dtypes.items()}
            values = itertools.chain(
                table_values(table, leaves, named), _unused_values(form, base, unused, kept, config)
            )
            max_bytes = max_bytes or form.max_bytes
            if max_bytes is None:
                write_file(partial / "model.safetensors", specs, values, on_bytes)
            else:
                write_model(partial, specs, values, max_bytes=max_bytes, on_bytes=on_bytes)
    if kept is not None and (statistics := read_statistics([kept])):
        merge_statistics(partial, statistics)


def _widest(shapes: dict[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the type in which no parameter that a checkpoint of others holds is rounded."""
    own = ("value_head/", "noise_head/")
    dtypes = {leaf.dtype.name for path, leaf in shapes.items() if not (is_adapter(path) or path.startswith(own))}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _typed(leaves: Leaves, dtypes: Any) -> Leaves:
    return lambda path: leaves(path).astype(jnp.dtype(dtype_of(path, dtypes)), copy=False)


def _unused_values(form: Format, base: Opened | None, unused: dict[str, Spec], kept: Path | None, config: ModelConfig):
    """Yields the tensors that are never run: those that are kept, adapters of an imported one merged, or zeros."""
    merge = merge_kept(kept, config.lora)
    for name, spec in unused.items():
        dtype = jnp.dtype(spec.dtype)
        if form.keeps_unused:
            yield name, merge(name, read(base.unused[name])).astype(dtype)
        else:
            yield form.prefix + name, np.broadcast_to(np.zeros((), dtype), spec.shape)
