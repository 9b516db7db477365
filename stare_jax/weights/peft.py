"""LoRA adapters of OpenVLA in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

Adapters of modules that are never run, and the copy of an adapted output layer that PEFT saves along, are kept aside
and come back as they were.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from stare_jax.documents import read_record, refuse_dangling
from stare_jax.documents.openvla import FloatType
from stare_jax.documents.peft import read_adapter
from stare_jax.models.nn.lora import LoRAConfig, adapted_module, name_targets
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights import files, side_files
from stare_jax.weights.files import Spec, WeightsError
from stare_jax.weights.format import Opened
from stare_jax.weights.heads import open_heads
from stare_jax.weights.openvla import adapter_table, tensor_table
from stare_jax.weights.tensor_table import FLOATS, Leaves, table_specs, table_values

PREFIX = "base_model.model."
_COPY, _SUFFIX_A = ".base_layer.weight", ".lora_A.weight"


class _Kept(NamedTuple):
    """record.json of an adapter in a converted folder."""

    modules: tuple[str, ...]
    dtype: FloatType


def _read_kept(kept: Path) -> _Kept:
    return read_record(_Kept, kept / side_files.RECORD)


def read_lora(folder: Path) -> LoRAConfig:
    """Reads rank and alpha of an adapter; raises DocumentError, see `read_adapter`."""
    adapter = read_adapter(folder / side_files.ADAPTER_CONFIG)
    return LoRAConfig(rank=adapter.r, alpha=adapter.lora_alpha)


def open_adapter(folder: Path, base: Opened) -> Opened:
    """Opens an adapter, compared with its base: the base's configuration with it, and tensors of adapters alone.

    Raises:
        DocumentError: its configuration is damaged or not supported, or it is a part of another policy.
        WeightsError: it is damaged, of another model, or adapts some of the layers that we keep
            as one array; tensors that do not fit are all listed.
    """
    refuse_dangling(folder)
    lora, file = read_lora(folder), folder / side_files.ADAPTER_MODEL
    if not file.exists():
        files.refuse_missing(folder, file.name)
    listed = files.list_file(file)
    if foreign := [name for name in listed if not name.startswith(PREFIX)]:
        raise WeightsError(f"{file}: got {foreign[0]}, expected names that begin with {PREFIX}")
    tensors = {name.removeprefix(PREFIX): stored for name, stored in listed.items()}
    full, whole = adapter_table(tensor_table(base.config)), {**base.tensors, **base.unused}
    copies = {name: f"{name.removesuffix(_COPY)}.weight" for name in tensors if name.endswith(_COPY)}
    dtypes = {stored.spec.dtype for name, stored in tensors.items() if name not in copies}
    if len(dtypes) != 1 or not dtypes <= {*FLOATS}:
        raise WeightsError(f"{file}: got adapters of {sorted(dtypes)}, expected one floating type")
    (dtype,) = dtypes
    adapted = {adapted_module(path) for path, entry in full.items() if tensors.keys() & set(entry.names)}
    if not adapted:
        raise WeightsError(f"{file}: got {', '.join(sorted(tensors)[:3])} ..., expected adapters of OpenVLA")
    lora = dataclasses.replace(lora, targets=name_targets(adapted, set(map(adapted_module, full))))
    config = dataclasses.replace(base.config, lora=lora)
    table = {path: entry for path, entry in full.items() if adapted_module(path) in adapted}
    used, unused = table_specs(table, config, dtype), _unused_specs(base, tensors, lora.rank, dtype)
    unused |= {n: whole[o].spec._replace(dtype=tensors[n].spec.dtype) for n, o in copies.items() if o in whole}
    files.check_tensors(file, tensors, used | unused)
    if changed := [name for name, original in copies.items() if not files.is_same(tensors[name], whole[original])]:
        raise WeightsError(f"{file}: {changed[0]}: got other values than the base model's, expected an adapter of it")
    parts = ({name: tensors[name] for name in specs} for specs in (used, unused))
    return Opened(base.form, folder, config, table, *parts, dict.fromkeys(used, dtype))


def join(base: Opened, adapter: Opened) -> Opened:
    """Returns weights together with an adapter of them, whose heads, if it has any, replace theirs."""
    table, heads = open_heads(adapter.folder, base.config)
    tensors = {**base.tensors, **adapter.tensors, **heads}
    return base._replace(config=adapter.config, table={**base.table, **adapter.table, **table}, tensors=tensors)


def _unused_specs(base: Opened, tensors: Collection[str], rank: int, dtype: str) -> dict[str, Spec]:
    """Returns the adapters of modules that are never run, for those that have any."""
    specs = {}
    for name, stored in base.unused.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(stored.spec.shape) == 2:
            pair = {f"{module}.lora_A.weight": (rank, stored.spec.shape[1])}
            pair[f"{module}.lora_B.weight"] = (stored.spec.shape[0], rank)
            if pair.keys() & set(tensors):
                specs |= {adapter: Spec(dtype, shape) for adapter, shape in pair.items()}
    return specs


def keep_adapter(adapter: Opened, kept: Path) -> list[str]:
    """Keeps what an adapter has beside its used tensors in its base's kept folder; returns names left behind."""
    record = {"modules": sorted(set(map(adapted_module, adapter.table))), "dtype": adapter.dtype}
    return side_files.keep_aside(adapter.folder, adapter.unused, record, kept / side_files.ADAPTER)


def kept_adapter(base: Opened, config: OpenVLAConfig, adapted: Collection[str]) -> Path | None:
    """Returns the folder of the adapter that is kept of a base, if it has modules, rank and alpha of the policy's."""
    kept = base.folder / side_files.ADAPTER
    if not kept.is_dir():
        return None
    lora = read_lora(kept)
    is_policys = (lora.rank, lora.alpha) == (config.lora.rank, config.lora.alpha)
    is_policys &= list(_read_kept(kept).modules) == sorted(set(map(adapted_module, adapted)))
    return kept if is_policys else None


def write_adapter(
    to: Path, base: Opened, config: OpenVLAConfig, leaves: Leaves, *, adapted: Collection[str], dtype: str | None = None
) -> None:
    """Writes a policy's adapters, at the paths `adapted`, into an empty folder, one leaf in memory at a time.

    What is kept of the base's adapter comes back, where this is that adapter, trained further or not. Without a type
    adapters are written in that adapter's, or else in float32.
    """
    kept, everything = kept_adapter(base, config, adapted), adapter_table(tensor_table(config))
    table = {path: entry for path, entry in everything.items() if path in set(adapted)}
    if kept is None:
        names = [name for entry in table.values() for name in entry.names]
        modules = [name.removesuffix(_SUFFIX_A) for name in names if name.endswith(_SUFFIX_A)]
        files.write_json(to / side_files.ADAPTER_CONFIG, _describe(config.lora, modules))
    else:
        side_files.copy_side_files(kept, to)
        dtype = dtype or _read_kept(kept).dtype
    dtype, unused = dtype or "float32", side_files.kept_unused(kept)
    specs = table_specs(table, config, dtype)
    specs |= {n: s.spec if n.endswith(_COPY) else s.spec._replace(dtype=dtype) for n, s in unused.items()}
    rest = ((PREFIX + name, files.read(stored).astype(jnp.dtype(specs[name].dtype))) for name, stored in unused.items())
    named = itertools.chain(table_values(table, leaves, specs, prefix=PREFIX), rest)
    files.write_file(to / side_files.ADAPTER_MODEL, {PREFIX + name: spec for name, spec in specs.items()}, named)


def _describe(lora: LoRAConfig, modules: Sequence[str]) -> dict[str, Any]:
    """Returns adapter_config.json of adapters that were made here; modules are named in full, so no others match."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "use_rslora": False,
        "use_dora": False,
    }
