"""LoRA adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

Adapters of modules that are never run are kept aside and come back as they were. PEFT saves a copy of the output layer
along when that is adapted; it has to be that of the base model, and comes back, too.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stare_jax.models.nn.lora import ALL_LINEAR, ATTENTION, LoRAConfig
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.format import Opened
from stare_jax.weights.merge import merge_tensor
from stare_jax.weights.openvla.table import adapter_table, tensor_table
from stare_jax.weights.safetensors_folder import (
    Spec,
    Stored,
    WeightsError,
    check_tensors,
    list_file,
    read,
    read_json,
    write_file,
)
from stare_jax.weights.side_files import (
    ADAPTER,
    ADAPTER_MODEL,
    RECORD,
    UNUSED,
    copy_side_files,
    keep_aside,
    write_json,
)
from stare_jax.weights.tensor_table import Entry, Leaves, leaf_shapes, table_specs, table_values, to_checkpoint

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_COPY, _SUFFIX_A = ".base_layer.weight", ".lora_A.weight"

_ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
"""what these fields may say; an initialisation that changes the base weights is not undone here."""
_WITHOUT_EFFECT = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "base_model_name_or_path", "revision"),
    *("auto_mapping", "task_type", "inference_mode", "loftq_config", "megatron_core", "peft_version", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
"""fields that say nothing about what the adapters compute, besides those read here; any other has to be empty."""


class Adapter(NamedTuple):
    """An adapter folder, checked and not read."""

    folder: Path
    lora: LoRAConfig
    table: dict[str, Entry]
    """where the adapters that our parameters hold are."""
    tensors: dict[str, Stored]
    unused: dict[str, Stored]
    """of modules that are never run."""
    copies: dict[str, str]
    """tensors of the base model that the file has as well: name in the file -> dtype there."""
    dtype: str
    """of the adapters."""


def read_lora(folder: Path) -> LoRAConfig:
    """Reads rank and alpha of an adapter; the targets are all, whatever it adapts.

    Raises:
        WeightsError: it does what is not supported; names all such fields.
    """
    file = folder / ADAPTER_CONFIG
    description = read_json(file)
    problems = [
        f"{name}: got {description[name]!r}, expected one of {allowed}"
        for name, allowed in _ALLOWED.items()
        if name in description and description[name] not in allowed
    ]
    problems += [
        f"{name}: got {value!r}, which is not supported"
        for name, value in sorted(description.items())
        if value and name not in _ALLOWED and name not in _WITHOUT_EFFECT
    ]
    problems += [f"{name}: got nothing, expected a number" for name in ("r", "lora_alpha") if name not in description]
    if problems:
        raise WeightsError(f"{file}:\n  " + "\n  ".join(problems))
    try:
        return LoRAConfig(rank=int(description["r"]), alpha=float(description["lora_alpha"]))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{file}: {error}") from error


def open_adapter(folder: Path, base: Opened) -> Adapter:
    """Finds an adapter's tensors and compares them with what its configuration and the base model ask for.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: the model that it adapts, in Hugging Face's format.

    Raises:
        WeightsError: it does what is not supported, is damaged, is of another model, or adapts some of the layers that
            we keep as one array; tensors that do not fit are all listed.
    """
    lora = read_lora(folder)
    if not (folder / ADAPTER_MODEL).exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise WeightsError(f"{folder}: got {others or 'no weights'}, expected {ADAPTER_MODEL}; pickles are never read")
    listed = list_file(folder / ADAPTER_MODEL)
    if foreign := [name for name in listed if not name.startswith(PREFIX)]:
        raise WeightsError(f"{folder / ADAPTER_MODEL}: got {foreign[0]}, expected names that begin with {PREFIX}")
    tensors = {name.removeprefix(PREFIX): stored for name, stored in listed.items()}
    copies = {name for name in tensors if name.endswith(_COPY)}
    dtypes = {stored.spec.dtype for name, stored in tensors.items() if name not in copies}
    if len(dtypes) != 1 or not jnp.issubdtype(jnp.dtype(next(iter(dtypes))), jnp.floating):
        raise WeightsError(f"{folder / ADAPTER_MODEL}: got adapters of {sorted(dtypes)}, expected one floating type")
    (dtype,) = dtypes
    full = adapter_table(tensor_table(base.config))
    adapted = {module_of(path) for path, entry in full.items() if tensors.keys() & set(entry.names)}
    if not adapted:
        raise WeightsError(
            f"{folder / ADAPTER_MODEL}: got {', '.join(sorted(tensors)[:3])} ..., expected adapters of OpenVLA"
        )
    lora = dataclasses.replace(lora, targets=_targets(adapted, {module_of(path) for path in full}))
    table = {path: entry for path, entry in full.items() if module_of(path) in adapted}
    used = table_specs(table, leaf_shapes(dataclasses.replace(base.config, lora=lora)), dtype)
    unused = _unused_specs(base, tensors, lora.rank, dtype)
    whole = base.tensors | base.unused
    expected = used | unused
    for name in copies:
        if (original := name.removesuffix(_COPY) + ".weight") in whole:
            expected[name] = Spec(tensors[name].spec.dtype, whole[original].spec.shape)
    check_tensors(folder / ADAPTER_MODEL, tensors, expected)
    for name in copies:
        _check_copy(folder / ADAPTER_MODEL, name, tensors[name], whole[name.removesuffix(_COPY) + ".weight"])
    parts = ({name: tensors[name] for name in specs} for specs in (used, unused))
    return Adapter(folder, lora, table, *parts, {name: tensors[name].spec.dtype for name in copies}, dtype)


def module_of(path: str) -> str:
    """Returns the path of the module that a parameter belongs to."""
    return path.rpartition("/")[0]


def _targets(adapted: Collection[str], everything: Collection[str]) -> tuple[str, ...]:
    """Returns the shortest of the ways in which `LoRAConfig` can name the adapted modules."""
    for targets in (ALL_LINEAR, ATTENTION):
        if adapted == {module for module in everything if any(re.search(pattern, module) for pattern in targets)}:
            return targets
    return tuple(f"^{module}$" for module in sorted(adapted))


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


def _check_copy(file: Path, name: str, copy: Stored, original: Stored, num_rows: int = 1024) -> None:
    """Compares a tensor with the base model's, some rows at a time."""
    got, expected = read(copy), read(original)
    for start in range(0, len(got), num_rows):
        rows = slice(start, start + num_rows)
        if not np.array_equal(got[rows].view(np.uint8), expected[rows].astype(got.dtype).view(np.uint8)):
            raise WeightsError(f"{file}: {name}: got other values than the base model's, expected an adapter of it")


def keep_adapter(adapter: Adapter, kept: Path) -> list[str]:
    """Keeps aside what an adapter folder has beside the adapters that our parameters hold.

    Args:
        adapter: see `open_adapter`.
        kept: the folder of what is kept of its base.

    Returns:
        The names of what is left behind.
    """
    record = {"modules": sorted(set(map(module_of, adapter.table))), "dtype": adapter.dtype, "copies": adapter.copies}
    return keep_aside(adapter.folder, adapter.unused, record, kept / ADAPTER)


def kept_adapter(base: Opened, config: OpenVLAConfig, adapted: Collection[str]) -> Path | None:
    """Returns where an adapter is kept, if it is of the same modules, rank and alpha as the one that is exported.

    Args:
        base: where the policy came from.
        config: of the policy.
        adapted: the paths of its adapters.
    """
    kept = base.folder / ADAPTER
    if not (kept / RECORD).exists():
        return None
    lora = read_lora(kept)
    is_same = (lora.rank, lora.alpha) == (config.lora.rank, config.lora.alpha)
    is_same &= read_json(kept / RECORD)["modules"] == sorted(set(map(module_of, adapted)))
    return kept if is_same else None


def write_adapter(
    to: Path, base: Opened, config: OpenVLAConfig, leaves: Leaves, *, adapted: Collection[str], dtype: str | None = None
) -> None:
    """Writes an adapter folder, one leaf in memory at a time.

    Args:
        to: an empty folder.
        base: gives what is kept of an imported adapter, where this is that adapter, trained further or not.
        config: of the policy.
        leaves: its parameters.
        adapted: the paths of the adapters among them.
        dtype: of the file's adapters; None takes that of the imported file, float32 where there is none.
    """
    kept, everything = kept_adapter(base, config, adapted), adapter_table(tensor_table(config))
    table = {path: entry for path, entry in everything.items() if path in set(adapted)}
    record: dict[str, Any] = {"dtype": "float32", "copies": {}}
    unused: dict[str, Stored] = {}
    if kept is None:
        names = [name for entry in table.values() for name in entry.names]
        modules = [name.removesuffix(_SUFFIX_A) for name in names if name.endswith(_SUFFIX_A)]
        write_json(to / ADAPTER_CONFIG, _describe(config.lora, modules))
    else:
        record, unused = read_json(kept / RECORD), _kept_unused(kept)
        copy_side_files(kept, to)
    dtype = dtype or record["dtype"]
    specs = table_specs(table, leaf_shapes(config), dtype)
    specs |= {name: Spec(dtype, stored.spec.shape) for name, stored in unused.items()}
    rest = ((name, read(stored).astype(jnp.dtype(dtype))) for name, stored in unused.items())
    values = [table_values(table, leaves, dtype), rest]
    for name, copy_dtype in record["copies"].items():
        value = _base_tensor(name.removesuffix(_COPY) + ".weight", base, config, leaves).astype(jnp.dtype(copy_dtype))
        specs[name] = Spec(copy_dtype, value.shape)
        values.append(iter([(name, value)]))
    named = ((PREFIX + name, value) for name, value in itertools.chain(*values))
    write_file(to / ADAPTER_MODEL, {PREFIX + name: spec for name, spec in specs.items()}, named)


def _base_tensor(name: str, base: Opened, config: OpenVLAConfig, leaves: Leaves) -> np.ndarray:
    if name in base.unused:
        return read(base.unused[name])
    (path, entry), *_ = (item for item in tensor_table(config).items() if name in item[1].names)
    leaf = leaves(path)
    return to_checkpoint(leaf[entry.names.index(name)] if entry.num_stacked else leaf, entry.kind)


def _describe(lora: LoRAConfig, modules: Sequence[str]) -> dict[str, Any]:
    """Returns adapter_config.json of adapters that were made here; modules are named in full, so no others match."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _kept_unused(kept: Path) -> dict[str, Stored]:
    return list_file(kept / UNUSED) if (kept / UNUSED).exists() else {}


def merge_kept(kept: Path | None, lora: LoRAConfig) -> Callable[[str, np.ndarray], np.ndarray]:
    """Returns a function that puts the kept adapters of tensors that are never run into them, as PEFT's merge does."""
    adapters: Mapping[str, Stored] = {} if kept is None else _kept_unused(kept)

    def merge(name: str, tensor: np.ndarray) -> np.ndarray:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in adapters:
            return tensor
        a, b = (read(adapters[f"{module}.{which}.weight"]) for which in ("lora_A", "lora_B"))
        return merge_tensor(tensor, a, b, lora)

    return merge
