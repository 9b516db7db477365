"""Parameters that a phase starts from, once the model that they are of is known to be the run's."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stare_jax.config import ConfigError, from_dict, to_dict
from stare_jax.logging import progress_bytes, say
from stare_jax.models import MLPConfig, ModelConfig, OpenVLAConfig, Pi05Config, Policy
from stare_jax.models.nn.lora import LoRAConfig, add_adapters, drop_adapters, init_adapters, keep_adapters
from stare_jax.state.checkpoint import load_model, load_params, param_shapes
from stare_jax.state.train_state import CHECKPOINTS, abstract_params, num_bytes
from stare_jax.types import PyTree
from stare_jax.weights.formats import FORMATS, find_format, is_ours, open_weights, read_params
from stare_jax.weights.side_files import TOKENIZER_FILES
from stare_jax.weights.tensor_table import adapted_module, is_adapter, leaf_shapes

EXECUTION_FIELDS = ("execution", "frozen_patterns", "decode_unroll", "unstack_layers")
"""fields of a model that say how it is computed, kept in memory and trained, and not what it computes"""
_COLOURS = ("mean", "std")
_ROUNDING = 2e-3
"""largest difference of colours' statistics that comes of rounding: published files have them in bfloat16"""


def initial_params(source: Path | None, policy: Policy, model: ModelConfig, mesh: Mesh, key: jax.Array) -> PyTree:
    """Returns parameters on the mesh, once the source's model is known to be the run's.

    Args:
        source: a phase of a run, a converted folder, or a checkpoint of others; None takes random weights.
        policy: the run's policy.
        model: configuration that the policy was made of; adapters that the source does not have are fresh.
        mesh: devices that the parameters are to be on.
        key: consumed.

    Raises:
        ConfigError: the model computes something else than the source's; names all fields that differ.
        CheckpointError, WeightsError: the source is damaged, or its parameters are not the model's.
    """
    like = abstract_params(policy, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    if source is None:
        return jax.jit(policy.init, out_shardings=shardings)(key)
    check_same_model(stored_model(source), model, source=source)
    adapters_key, key = jax.random.split(key)
    if is_ours(source):
        has_adapters = any(map(is_adapter, param_shapes(source / CHECKPOINTS)))
        loaded = load_params(source / CHECKPOINTS, like if has_adapters else drop_adapters(like), cast=True)
    else:
        opened = open_weights(source, config=model)
        has_adapters = any(map(is_adapter, opened.table))
        with progress_bytes(num_bytes(drop_adapters(like)), f"read {source.name}") as on_bytes:
            loaded = read_params(opened, key, like=like, on_bytes=on_bytes)
    if model.lora is None or has_adapters:
        return loaded
    adapters = init_adapters(policy.init, adapters_key, out_shardings=keep_adapters(shardings))
    return add_adapters(loaded, adapters)


def is_converted(folder: Path) -> bool:
    """Returns whether a folder holds a converted checkpoint, and not a phase of a run."""
    return is_ours(folder) and any((folder / form.kept).is_dir() for form in FORMATS)


def stored_model(source: Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns the fields of the model's configuration that a checkpoint of any kind tells, all, some or none.

    The step is a phase's; None takes the latest.
    """
    if not is_ours(source):
        form, _ = find_format(source)
        return form.known(source)
    fields = dict(load_model(source / CHECKPOINTS, step=step))
    if (tokenizer := fields.get("tokenizer")) and is_converted(source) and (source / tokenizer).is_dir():
        fields["tokenizer"] = str(source / tokenizer)
    return fields


def model_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """Builds a model's configuration from its fields, which tell its kind; raises ConfigError where one is wrong."""
    return from_dict(_kind(fields), fields, path="model")


def _kind(fields: Mapping[str, Any]) -> type:
    return Pi05Config if "paligemma" in fields else OpenVLAConfig if "llm" in fields else MLPConfig


def check_same_model(stored: Mapping[str, Any], wanted: ModelConfig, *, source: Path | str = "the checkpoint") -> None:
    """Makes sure that a model computes the same as a stored one, apart from parameters.

    All fields are compared but those of `EXECUTION_FIELDS`; statistics of the images' colours may differ by rounding,
    tokenizers by the folder that they lie in, and a model may have adapters that the stored one does not have.

    Fields that are missing in the stored model are not compared, and {} is said to be unknown.

    Raises:
        ConfigError: names the source, and all fields that differ, one per line, got and expected.
    """
    if not stored:
        say(f"{source}: its configuration is not in it, so that only names and shapes of its parameters are compared")
        return
    stored, fields = (json.loads(json.dumps(tree)) for tree in (stored, to_dict(wanted)))
    if _kind(stored) is not type(wanted):
        raise ConfigError(f"{source}: got a {type(wanted).__name__} for a model, expected {_kind(stored).__name__}")
    problems = []
    for name, expected in stored.items():
        got = fields.get(name)
        if name in EXECUTION_FIELDS or name not in fields or (name == "lora" and expected is None):
            continue
        if name == "lora" and got is not None:
            problems += _compare_adapters(from_dict(LoRAConfig, expected, path="lora"), wanted)
        elif name != "tokenizer" or not _is_same_tokenizer(got, expected):
            problems += _compare(f"model.{name}", got, expected)
    if problems:
        raise ConfigError(f"{source} is of another model:\n  " + "\n  ".join(problems))


def _compare_adapters(expected: LoRAConfig, model: ModelConfig) -> list[str]:
    """Compares ranks and alphas; the parameters themselves tell which products have adapters."""
    got = model.lora
    if not (got.overrides or expected.overrides):
        sizes = ({"rank": lora.rank, "alpha": lora.alpha} for lora in (got, expected))
        return _compare("model.lora", *sizes)
    problems = []
    for module in sorted({adapted_module(path) for path in leaf_shapes(model) if is_adapter(path)}):
        ours, theirs = (
            (lora.rank_of(module), lora.rank_of(module) * lora.scale_of(module)) for lora in (got, expected)
        )
        if ours != theirs:
            problems.append(f"model.lora: {module}: got rank and alpha {ours}, expected {theirs}")
    return problems


def _compare(name: str, got: Any, expected: Any) -> list[str]:
    if isinstance(got, dict) and isinstance(expected, dict):
        fields = [field for field in expected if field in got]
        return [line for field in fields for line in _compare(f"{name}.{field}", got[field], expected[field])]
    if name.endswith(_COLOURS) and got and np.shape(got) == np.shape(expected):
        is_same = np.allclose(got, expected, atol=_ROUNDING)
    else:
        is_same = got == expected
    return [] if is_same else [f"{name}: got {got!r}, expected {expected!r}"]


def _is_same_tokenizer(got: str, expected: str) -> bool:
    """Returns whether two tokenizers are the same, as far as can be told: a name says nothing of a folder's files."""
    if got == expected or "words" in (got, expected):
        return got == expected
    folders = [Path(got), Path(expected)]
    if not all(folder.is_dir() for folder in folders):
        return True
    common = [name for name in TOKENIZER_FILES if all((folder / name).is_file() for folder in folders)]
    return all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in common)


def with_colours(stored: Mapping[str, Any], model: ModelConfig) -> ModelConfig:
    """Returns the run's model with a stored one's statistics of colours, which are the same but for rounding."""
    for name in ("dino", "siglip"):
        tower, theirs = getattr(model, name, None), stored.get(name) or {}
        if tower is not None:
            colours = {field: tuple(theirs[field]) for field in _COLOURS if field in theirs}
            model = dataclasses.replace(model, **{name: dataclasses.replace(tower, **colours)})
    return model
