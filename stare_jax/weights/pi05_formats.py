"""Formats of pi0.5: openpi's tree, the tensors of its PyTorch port and of lerobot, PaliGemma's arrays."""

import dataclasses
import functools
import logging
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.config import ConfigError, from_dict, to_dict
from stare_jax.models import pi05_base, pi05_droid, pi05_libero, pi05_maniskill
from stare_jax.models.nn.lora import LoRAConfig, LoRAOverride
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.prompt import STATELESS_TEMPLATE
from stare_jax.state.storage import load_leaf, nest, save_tree, tree_shapes
from stare_jax.weights import files
from stare_jax.weights.files import Spec, Stored, Tensors, WeightsError
from stare_jax.weights.format import Format
from stare_jax.weights.pi05_port import LEROBOT_PREFIX, UNUSED, clean_names, find_prefix, tensor_table
from stare_jax.weights.side_files import CONFIG, describe
from stare_jax.weights.statistics import list_assets, read_asset, write_openpi_stats
from stare_jax.weights.tensor_table import Entry, adapted_module, is_adapter, leaf_shapes

PRESETS = {preset.__name__: preset for preset in (pi05_base, pi05_droid, pi05_libero, pi05_maniskill)}
_TREE = "_METADATA"
"""file of Orbax's that says what is in a tree"""
OUR_OWN = ("value_head/", "noise_head/", "stem/", "state_embed/")
"""parts that openpi's models do not have"""
_ROOTS = ("params/img/", "params/llm/")
"""beginnings of the names of PaliGemma's arrays, as Google publishes them in an npz file"""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NOISE = ("Metadata file does not exist", "Failed to resolve handler for checkpointable")
# Orbax says so of every leaf where a tree was copied without the file that was beside it.
logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(_NOISE))


def read_config(source: Path) -> Pi05Config:
    """Returns the model of weights: that of config.json beside them, where it is ours, or that of their statistics.

    openpi's pi05_base has statistics of several robots, pi05_droid and pi05_libero those of one. Raises ConfigError
    where neither tells.
    """
    if description := _known(source):
        return from_dict(Pi05Config, description, path=str(source / CONFIG))
    assets = list_assets(source)
    if len(assets) > 1:
        return pi05_base()
    for asset_id in assets:
        for name, preset in (("libero", pi05_libero), ("droid", pi05_droid)):
            if name in asset_id:
                return preset()
    expected = f"expected its name, one of {', '.join(PRESETS)}, or a JSON file of its configuration (--model)"
    raise ConfigError(f"{source}: model: got weights of pi0.5 that do not say which model they are of, {expected}")


def _known(source: Path) -> dict:
    """Returns the fields of config.json beside weights, where it is ours."""
    description = describe(source)
    return description if "paligemma" in description else {}


def named_model(model: str) -> Pi05Config:
    """Returns the model of a preset's name, a JSON file or a run's config.json; raises ConfigError for another."""
    if model in PRESETS:
        return PRESETS[model]()
    if not Path(model).is_file():
        raise ConfigError(f"model: got {model!r}, expected one of {', '.join(PRESETS)}, or a JSON file")
    description = files.read_json(Path(model))
    fields = description.get("model", description) if isinstance(description, dict) else None
    if not isinstance(fields, Mapping) or "paligemma" not in fields:
        raise ConfigError(f"{model}: got another content, expected the fields of Pi05Config, or a run's config.json")
    return from_dict(Pi05Config, fields, path=model)


def _list_port(source: Path, *, prefix: str) -> Tensors | None:
    if source.is_dir() and not any(source.glob("model*.safetensors*")):  # files, or an index of them
        return None
    tensors = files.list_model(source)
    return tensors if find_prefix(tensors) == prefix else None


def _list_tree(source: Path) -> Tensors | None:
    folder = next((folder for folder in (source / "params", source) if (folder / _TREE).is_file()), None)
    if folder is None:
        return None
    return {
        path: Stored(Spec(leaf.dtype.name, leaf.shape), source, load=functools.partial(load_leaf, folder, path, leaf))
        for path, leaf in tree_shapes(folder).items()
    }


def _list_npz(file: Path) -> Tensors | None:
    """Lists the arrays of an npz file, whatever its name; raises WeightsError where they are not PaliGemma's."""
    if not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if not names or not all(name.endswith(".npy") for name in names):
                return None
            specs = {name.removesuffix(".npy"): _read_header(archive, name) for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file}: got {error}, expected a whole npz file") from error
    if foreign := [name for name in specs if not name.startswith(_ROOTS)]:
        got = ", ".join(sorted(foreign)[:5])
        raise WeightsError(f"{file}: got {got}, expected PaliGemma's arrays, all under {' and '.join(_ROOTS)}")
    return {name: Stored(spec, file, load=functools.partial(_read_array, file, name)) for name, spec in specs.items()}


def _read_header(archive: zipfile.ZipFile, name: str) -> Spec:
    with archive.open(name) as stream:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    return Spec(_name_type(dtype).name, shape)


def _name_type(dtype: np.dtype) -> np.dtype:
    """Returns the type that is meant: NumPy's format has no name for bfloat16, and calls it two bytes of anything."""
    return jnp.dtype(jnp.bfloat16) if dtype == np.dtype("V2") else dtype


def _read_array(file: Path, name: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:  # pickles are never read
        array = arrays[name]
    return array.view(_name_type(array.dtype))


def _clean_tree(source: Path, tensors: Tensors) -> tuple[Tensors, Sequence[str]]:
    """Gives leaves their paths in our tree; raises WeightsError where they are not under `params`, or pi0's."""
    paths = {name: name.removeprefix("params/") for name in tensors}
    if foreign := [name for name, path in paths.items() if path == name]:
        raise WeightsError(f"{source}: got {', '.join(sorted(foreign)[:5])}, expected all leaves under params/")
    if all(path.endswith("/value") for path in paths.values()):  # as the state of an NNX module has it
        paths = {name: path.removesuffix("/value") for name, path in paths.items()}
    old = [p for p in paths.values() if p.endswith("_norm_1/scale") or p.startswith(("state_proj/", "action_time_"))]
    if old:
        raise WeightsError(f"{source}: got weights of pi0 ({', '.join(sorted(old)[:5])}), expected pi0.5's")
    return {path: tensors[name] for name, path in paths.items()}, ()


def _tree_table(config: Pi05Config, names: Collection[str]) -> dict[str, Entry]:
    """Returns the leaves of openpi's tree, which is ours; adapters are among them where any are among the names."""
    has_adapters = any(map(is_adapter, names))
    paths = (path for path in leaf_shapes(config) if not path.startswith(OUR_OWN))
    return {path: Entry((path,), "same") for path in paths if has_adapters or not is_adapter(path)}


def _paligemma_table(config: Pi05Config, names: Collection[str]) -> dict[str, Entry]:
    """Returns the leaves that are PaliGemma's, and not the action expert's; the tower numbers its norms, too."""
    tower, expert = re.compile("PaliGemma/img/"), re.compile(r"_1(/|$)")
    return {
        path: entry
        for path, entry in _tree_table(config, ()).items()
        if tower.match(path) or (path.startswith("PaliGemma/") and not expert.search(path))
    }


def read_lora(specs: Mapping[str, Spec]) -> LoRAConfig | None:
    """Returns the configuration of adapters in openpi's tree, whose alpha is their rank; None where there are none."""
    ranks = {adapted_module(path): spec.shape[-1] for path, spec in specs.items() if path.endswith("lora_a")}
    if not ranks:
        return None
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != most}
    overrides = tuple(LoRAOverride(f"^{re.escape(module)}$", rank, float(rank)) for module, rank in others.items())
    targets = tuple(f"^{module}$" for module in sorted(ranks))
    return LoRAConfig(rank=most, alpha=float(most), targets=targets, overrides=overrides)


def _for_robot(config: Pi05Config, action_dim: int, state_dim: int) -> Pi05Config:
    """Gives a model a robot's numbers; a robot without a state takes the state out of the prompt."""
    is_shown = state_dim or "{state}" not in config.prompt_template
    template = config.prompt_template if is_shown else STATELESS_TEMPLATE
    return dataclasses.replace(config, action_dim=action_dim, state_dim=state_dim, prompt_template=template)


def _write_config(folder: Path, config: Pi05Config, dtype: str | None) -> None:
    if not (folder / CONFIG).exists():
        files.write_json(folder / CONFIG, to_dict(config))


def _write_tree(to: Path, values: files.Named, on_bytes: files.OnBytes) -> None:
    """Writes openpi's tree. Orbax wants it whole, so that it lies in files meanwhile, which take no memory."""
    scratch, cpu, written = to / "leaves.partial", jax.local_devices(backend="cpu")[0], {}
    scratch.mkdir()
    for path, value in values:  # not enumerated: that would keep a value while the next one is loaded
        leaf, file = np.ascontiguousarray(value), scratch / str(len(written))
        leaf.reshape(-1).view(np.uint8).tofile(file)
        mapped = np.memmap(file, leaf.dtype, "r", shape=leaf.shape)
        written[path] = jax.device_put(mapped, cpu)  # without a copy
        on_bytes(leaf.nbytes)
        del value, leaf  # before the next one is loaded
    save_tree(to, "params", {"params": nest(written)})
    shutil.rmtree(scratch)


OPENPI = Format(
    name="openpi",
    model=Pi05Config,
    kept="openpi",
    find=_list_tree,
    clean=_clean_tree,
    read_config=read_config,
    table=_tree_table,
    statistics=read_asset,
    add_statistics=write_openpi_stats,
    finish=_write_config,
    write_tree=_write_tree,
    for_robot=_for_robot,
    read_lora=read_lora,
    known=_known,
)
PORT = OPENPI._replace(
    name="safetensors",
    find=functools.partial(_list_port, prefix=""),
    clean=clean_names,
    table=lambda config, names: tensor_table(config),
    unused=lambda config, dtype: {UNUSED: Spec(dtype, (config.vocab_size, config.expert.width))},
    write_tree=None,
)
LEROBOT = PORT._replace(
    name="lerobot",
    find=functools.partial(_list_port, prefix=LEROBOT_PREFIX),
    prefix=LEROBOT_PREFIX,
    finish=lambda folder, config, dtype: None,  # its own config.json is not ours to write
)
PALIGEMMA = OPENPI._replace(
    name="paligemma",
    find=_list_npz,
    clean=lambda source, tensors: ({f"PaliGemma/{n.removeprefix('params/')}": s for n, s in tensors.items()}, ()),
    table=_paligemma_table,
)
