"""Conversion of checkpoints: from the formats of others to a folder that a run starts from, and back.

There is one way in and one way out for all formats; a result is there when it is complete, or not at all.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from stare_jax.config import ConfigError, to_dict, user_input
from stare_jax.logging import Interruption, new_directory, progress_bytes, say
from stare_jax.models import ModelConfig, Policy, make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.checkpoint import load_norm_stats, save_params
from stare_jax.state.leaves import leaf_loader
from stare_jax.state.storage import flatten
from stare_jax.state.train_state import CHECKPOINTS, abstract_params, num_bytes
from stare_jax.types import NormStats, PyTree
from stare_jax.weights import heads, peft, side_files
from stare_jax.weights.format import Format, Opened, check_counterpart, read_params, with_dtype
from stare_jax.weights.formats import FORMATS, OPENVLA, PALIGEMMA, open_weights
from stare_jax.weights.merge import merged_leaves
from stare_jax.weights.openvla.config import merge_statistics, read_norm_stats, read_statistics
from stare_jax.weights.origin import Origin, check_unchanged, find_origin
from stare_jax.weights.safetensors_folder import Spec, WeightsError, read, write_file, write_model
from stare_jax.weights.tensor_table import (
    FLOATS,
    adapted_module,
    dtype_of,
    is_adapter,
    table_specs,
    table_values,
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
    """Converts weights of others to a new folder that a run starts from, and that stands alone; see `side_files`.

    Args:
        source: see `open_weights`.
        to: the folder.
        config: of the model; None takes what the source says.
        adapter: a PEFT folder of OpenVLA's, whose adapters become part of the parameters.
        unnorm_key: data set, or asset, whose statistics the policy has; may be left out where there is only one.
        action_dim: A of the robot, to which longer statistics of openpi's are cut; None takes them all.
        state_dim: S, likewise; 0 takes the state out of pi0.5's prompt.
        dtype: of the parameters, adapters and heads apart; None takes the source's.
        fsdp: devices over which weights are cut meanwhile, see `sharding.make_mesh`; with 1 of these and of `tensor`
            they are cut over the devices that the host's processor counts as: a part is the least that is written.
        tensor: devices over which single matrices are cut.
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
    form, left, folders = opened.form, list(opened.left), [source]
    own = None
    if adapter is not None:
        if form is not OPENVLA:
            raise ConfigError(f"adapter: got {adapter}, expected none: {source} is no OpenVLA checkpoint")
        own, folders = peft.open_adapter(adapter, opened), [source, adapter]
        opened = opened.join(own)
    config = with_dtype(opened.config, dtype or opened.dtype)
    known_dim = state_dim if form.for_robot else config.state_dim
    stats_name, norm_stats = form.statistics(folders, unnorm_key, action_dim, known_dim)
    if norm_stats is None:
        dims = [(action_dim, config.action_dim), (state_dim, config.state_dim)]
        norm_stats = identity_stats(*(default if given is None else given for given, default in dims))
    with user_input():
        if form.for_robot is not None:
            config = form.for_robot(config, len(norm_stats.action_q01), len(norm_stats.state_q01))
        policy = make_policy(config, norm_stats)
    opened = opened._replace(config=config)
    like = _layout(policy, fsdp, tensor)
    check_space(to, num_bytes(like))
    with new_directory(to) as partial:
        kept = partial / form.kept
        dtypes = opened.dtypes if not form.one_dtype and len(set(opened.dtypes.values())) > 1 else {}
        left += side_files.keep_aside(source, opened.unused, {"form": form.name, "dtypes": dtypes}, kept)
        left += [] if own is None else peft.keep_adapter(own, kept)
        with progress_bytes(num_bytes(like), f"read {source.name}") as on_bytes:
            params = read_params(opened, jax.random.key(seed), like=like, on_bytes=on_bytes)
        config = _keep_tokenizer(config, source, partial, kept)
        _save(partial, params, config, norm_stats)
    sizes = {path: leaf.size for path, leaf in flatten(params).items()}
    counts = sum(sizes.values()), num_bytes(params), sum(sizes[path] for path in opened.fresh), len(opened.unused)
    return Imported(form.name, config, stats_name, *counts, tuple(left))


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {FLOATS}")


def _layout(policy: Policy, fsdp: int, tensor: int) -> PyTree:
    """Returns shapes and shardings of the parameters while they are converted."""
    if fsdp * tensor > 1:
        return abstract_params(policy, make_mesh(fsdp=fsdp, tensor=tensor))
    devices = jax.local_devices(backend="cpu")
    mesh, whole = Mesh(np.array(devices), ("part",)), SingleDeviceSharding(devices[0])

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % len(devices) == 0]
        sharding = NamedSharding(mesh, P(*[None] * axes[0], "part")) if axes else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, jax.eval_shape(policy.init, jax.random.key(0)))


def _keep_tokenizer(config: ModelConfig, source: Path, partial: Path, kept: Path) -> ModelConfig:
    """Returns a configuration whose tokenizer, if it is a folder, lies in the converted one and is named from there."""
    if side_files.holds_tokenizer(kept) or config.tokenizer == str(source):
        return dataclasses.replace(config, tokenizer=kept.name)
    if Path(config.tokenizer).is_dir():
        side_files.copy_tokenizer(Path(config.tokenizer), partial / "tokenizer")
        return dataclasses.replace(config, tokenizer="tokenizer")
    return config


def _save(folder: Path, params: PyTree, config: ModelConfig, norm_stats: NormStats) -> None:
    say(f"saving {num_bytes(params) / 1e9:.2f} GB")
    with Interruption() as interruption:  # Orbax writes from many threads, which go on when one is interrupted
        save_params(folder / CHECKPOINTS, 0, params, model=to_dict(config), norm_stats=norm_stats)
    if interruption.requested:
        raise KeyboardInterrupt
    side_files.write_json(folder / "config.json", {"model": to_dict(config)})


def check_space(to: Path, size: int) -> None:
    """Raises ConfigError unless the disk of a path that is to be written has room for a number of bytes."""
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
    """Converts a converted folder, or a phase of a run, to a new folder of weights as other programs read them.

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
    origin = find_origin(source, base, step, model)
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
    if name in read_statistics(folders):
        known = read_norm_stats(*folders, unnorm_key=name, state_dim=len(stats.state_q01))
        if not all(map(np.array_equal, known, stats)):
            raise ConfigError(f"stats_name: got {name!r}, of which the checkpoint has others, expected a new name")


def _write_adapter(partial: Path, origin: Origin, dtype: str | None) -> None:
    """Writes OpenVLA's adapters alone, and the value head."""
    if origin.is_run:
        check_unchanged(origin)
        dtype = dtype or "float32"  # in which they are trained, whatever they came in
    heads.write_heads(partial, origin.config, origin.leaves(()))
    leaves = leaf_loader(origin.checkpoints, origin.adapted, step=origin.step)
    peft.write_adapter(partial, origin.base, origin.config, leaves, adapted=origin.adapted, dtype=dtype)


def _write_model(
    partial: Path, origin: Origin, form: Format, *, merge: bool, dtype: str | None, max_bytes: int | None
) -> None:
    """Writes the whole model, adapters merged where that is wanted, and what is beside it."""
    config, base, adapted = origin.config, origin.base, origin.adapted
    table = form.table(config, () if merge else adapted)
    dtypes = dtype or _widest(origin.shapes)
    has_same_names = base is not None and (base.form.write_tree is None) == (form.write_tree is None)
    if dtype is None and has_same_names and not form.one_dtype and base.dtypes:
        dtypes = base.dtypes
    specs = table_specs(table, origin.shapes, dtypes)
    unused = form.unused(config, next(iter(specs.values())).dtype)
    size = sum(spec.num_bytes for spec in (specs | unused).values())
    check_space(partial, size if form.write_tree is None else 2 * size)
    leaves, kept = origin.leaves(list(table)), None
    if merge:
        leaves = merged_leaves(leaves, set(adapted), config.lora)
        kept = peft.kept_adapter(base, config, adapted) if form is OPENVLA else None
    if form is OPENVLA or (base is not None and base.form.name == form.name):
        side_files.copy_side_files(base.folder, partial)
    elif base is not None and (base.folder / side_files.ASSETS).is_dir():
        shutil.copytree(base.folder / side_files.ASSETS, partial / side_files.ASSETS)
    form.finish(partial, config, dtypes if form.one_dtype and dtypes != base.dtype else None)
    heads.write_heads(partial, config, leaves)
    with progress_bytes(size, "write") as on_bytes:
        if form.write_tree is not None:
            typed = lambda path: leaves(path).astype(jnp.dtype(dtype_of(path, dtypes)), copy=False)  # noqa: E731
            form.write_tree(partial, list(table), typed, on_bytes)
        else:
            values = table_values(table, leaves, dtypes, prefix=form.prefix)
            values = itertools.chain(values, _unused_values(form, base, unused, kept, config))
            named = {form.prefix + name: spec for name, spec in (specs | unused).items()}
            if (max_bytes or form.max_bytes) is None:
                write_file(partial / "model.safetensors", named, values, on_bytes)
            else:
                write_model(partial, named, values, max_bytes=max_bytes or form.max_bytes, on_bytes=on_bytes)
    if kept is not None and (statistics := read_statistics([kept])):
        merge_statistics(partial, statistics)


def _widest(shapes: dict[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the type in which no parameter that a checkpoint of others holds is rounded."""
    own = ("value_head/", "noise_head/")
    dtypes = {leaf.dtype.name for path, leaf in shapes.items() if not (is_adapter(path) or path.startswith(own))}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _unused_values(
    form: Format, base: Opened | None, unused: dict[str, Spec], kept: Path | None, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that are never run: those that are kept, with a kept adapter merged, or zeros."""
    merge = peft.merge_kept(kept, config.lora)
    for name, spec in unused.items():
        dtype = jnp.dtype(spec.dtype)
        if form.keeps_unused:
            yield name, merge(name, read(base.unused[name])).astype(dtype)
        else:
            yield form.prefix + name, np.broadcast_to(np.zeros((), dtype), spec.shape)
