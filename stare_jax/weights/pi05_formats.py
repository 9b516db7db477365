"""Formats of pi0.5: openpi's tree, the tensors of its PyTorch port and of lerobot, PaliGemma's arrays."""

import dataclasses
import functools
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from stare_jax.config import ConfigError, from_dict, to_dict, user_input
from stare_jax.documents import read_json
from stare_jax.documents.pi05 import read_description, read_processor_stats
from stare_jax.models import PI05_PALIGEMMA, pi05_base, pi05_droid, pi05_libero
from stare_jax.models.blank import leaf_shapes
from stare_jax.models.nn.lora import LoRAConfig, LoRAOverride, adapted_module, is_adapter
from stare_jax.models.pi05.network import Pi05Config
from stare_jax.models.pi05.presets import for_robot
from stare_jax.models.stored import NAMED_MODELS
from stare_jax.state.storage import explained, is_tree, load_leaf, save_tree, tree_shapes
from stare_jax.types import NormStats
from stare_jax.weights import files
from stare_jax.weights.files import Spec, Stored, Tensors, WeightsError
from stare_jax.weights.format import Format
from stare_jax.weights.heads import OUR_OWN
from stare_jax.weights.pi05_port import LEROBOT_PREFIX, UNUSED, clean_names, find_prefix, refuse_pi0, tensor_table
from stare_jax.weights.side_files import CONFIG
from stare_jax.weights.statistics import choose_name, list_assets, read_asset, write_openpi_stats
from stare_jax.weights.tensor_table import Entry

_ROBOTS = {"libero": pi05_libero, "droid": pi05_droid}
"""part of an asset's id -> the model whose statistics it has"""
_PROCESSOR = "policy_preprocessor"
"""name of the statistics in lerobot's processors"""
_PI0 = re.compile(r"_norm_1/scale$|^(state_proj/|action_time_)")
"""leaves of openpi's tree that only pi0 has"""
_ROOTS = ("params/img/", "params/llm/")
"""beginnings of the names of PaliGemma's arrays, as Google publishes them in an npz file"""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_config(source: Path) -> Pi05Config:
    """Returns the model of weights: that of config.json beside them, ours or lerobot's, or that of their statistics.

    openpi's pi05_base has statistics of several robots, pi05_droid and pi05_libero those of one. The config.json of its
    PyTorch port goes over what statistics say.

    Raises:
        ConfigError: none of these tells.
        DocumentError: config.json is damaged, or of a policy that computes something else.
    """
    if fields := _own_fields(source):
        return from_dict(Pi05Config, fields, path=str(source / CONFIG))
    told, assets = read_description(source), list_assets(source)
    presets = [preset for word, preset in _ROBOTS.items() if any(word in asset_id for asset_id in assets)]
    if told.cameras is not None or len(assets) > 1:
        presets = [pi05_base]
    if not presets:
        got = "got weights of pi0.5 that do not say which model they are of"
        raise ConfigError(f"{source}: model: {got}, expected its name, {NAMED_MODELS} (--model)")
    config, window = presets[0](), told.fields.get("window")
    fields = told.fields | {"cameras": told.cameras or config.cameras}
    fields["chunk"] = min(told.chunk or config.chunk, window or config.window)
    with user_input(str(source / CONFIG)):
        return dataclasses.replace(config, **fields)


def _own_fields(source: Path) -> dict:
    """Returns the fields of config.json beside weights, where it is ours."""
    fields = read_json(source / CONFIG, optional=True)
    return fields if "paligemma" in fields else {}


def _known(source: Path) -> dict:
    """Returns the fields of the model that config.json beside weights tells."""
    return _own_fields(source) or read_description(source).fields


def read_processors(
    folders: Sequence[Path], unnorm_key: str | None = None, action_dim: int | None = None, state_dim: int | None = None
) -> tuple[str, NormStats] | tuple[None, None]:
    """Reads the statistics of lerobot's processors in the first folder, or without any, or where an asset is named,
    openpi's; see `Format.statistics` and `read_processor_stats`."""
    assets = list_assets(folders[0])
    if unnorm_key in assets:
        return read_asset(folders, unnorm_key, action_dim, state_dim)
    found = read_processor_stats(folders[0], _load_file, action_dim=action_dim, state_dim=state_dim)
    if found is None:
        return read_asset(folders, unnorm_key, action_dim, state_dim)
    name = choose_name([*assets, _PROCESSOR], unnorm_key or _PROCESSOR, folders[0])
    action, state = found[0], found[1] or dict.fromkeys(("q01", "q99"), np.zeros(0, np.float32))
    return name, NormStats(action["q01"], action["q99"], action["mask"], state["q01"], state["q99"])


def _load_file(file: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(files.read(stored)) for name, stored in files.list_file(file).items()}


def _list_port(source: Path, *, prefix: str) -> Tensors | None:
    if source.is_dir() and not any(source.glob("model*.safetensors*")):  # files, or an index of them
        return None
    tensors = files.list_model(source)
    return tensors if find_prefix(tensors) == prefix else None


def _list_tree(source: Path) -> Tensors | None:
    folder = next(filter(is_tree, (source / "params", source)), None)
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
    return {n: Stored(spec, file, load=functools.partial(_read_array, file, n, spec)) for n, spec in specs.items()}


def _read_header(archive: zipfile.ZipFile, name: str) -> Spec:
    with archive.open(name) as stream:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    # NumPy's format has no name for bfloat16, and calls it two bytes of anything.
    return Spec("bfloat16" if dtype == np.dtype("V2") else dtype.name, shape)


def _read_array(file: Path, name: str, spec: Spec) -> np.ndarray:
    with explained(file), np.load(file, allow_pickle=False) as arrays:  # pickles are never read
        return arrays[name].view(jnp.dtype(spec.dtype))


def _clean_tree(source: Path, tensors: Tensors) -> tuple[Tensors, Sequence[str]]:
    """Gives leaves their paths in our tree; raises WeightsError where they are not under `params`, or pi0's."""
    paths = {name: name.removeprefix("params/") for name in tensors}
    if foreign := [name for name, path in paths.items() if path == name]:
        raise WeightsError(f"{source}: got {', '.join(sorted(foreign)[:5])}, expected all leaves under params/")
    if all(path.endswith("/value") for path in paths.values()):  # as the state of an NNX module has it
        paths = {name: path.removesuffix("/value") for name, path in paths.items()}
    refuse_pi0(source, [path for path in paths.values() if _PI0.search(path)])
    return {path: tensors[name] for name, path in paths.items()}, ()


def _tree_table(config: Pi05Config, names: Collection[str]) -> dict[str, Entry]:
    """Returns the leaves of openpi's tree, which is ours; adapters are among them where any are among the names."""
    has_adapters = any(map(is_adapter, names))
    paths = (path for path in leaf_shapes(config) if not path.startswith(OUR_OWN))
    return {path: Entry((path,), "same") for path in paths if has_adapters or not is_adapter(path)}


def _paligemma_table(config: Pi05Config, names: Collection[str]) -> dict[str, Entry]:
    return {path: entry for path, entry in _tree_table(config, ()).items() if re.search(PI05_PALIGEMMA, path)}


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


def _write_config(folder: Path, config: Pi05Config, dtype: str | None) -> None:
    if not (folder / CONFIG).exists():
        files.write_json(folder / CONFIG, to_dict(config))


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
    write_tree=lambda to, values, on_bytes: save_tree(to, "params", values, on_bytes),
    prefix="params/",
    for_robot=for_robot,
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
    prefix="",
)
LEROBOT = PORT._replace(
    name="lerobot",
    find=functools.partial(_list_port, prefix=LEROBOT_PREFIX),
    prefix=LEROBOT_PREFIX,
    statistics=read_processors,
    finish=lambda folder, config, dtype: None,  # its own config.json is not ours to write
)
PALIGEMMA = OPENPI._replace(
    name="paligemma",
    find=_list_npz,
    clean=lambda source, tensors: ({f"PaliGemma/{n.removeprefix('params/')}": s for n, s in tensors.items()}, ()),
    table=_paligemma_table,
)
