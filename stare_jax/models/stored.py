"""Configurations of models as checkpoints and files store them: built again, and compared with that of a run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.config import ConfigError, from_dict, home_path, to_dict
from stare_jax.documents import read_json
from stare_jax.models import (
    MLPConfig,
    ModelConfig,
    OpenVLAConfig,
    Pi05Config,
    pi05_base,
    pi05_droid,
    pi05_libero,
    pi05_maniskill,
)
from stare_jax.models.nn.lora import LoRAConfig
from stare_jax.models.openvla.sharding import adaptable_modules as openvla_modules
from stare_jax.models.pi05.sharding import adaptable_modules as pi05_modules
from stare_jax.models.tokenizer import TOKENIZER_FILES

_PRESETS = {preset.__name__: preset for preset in (pi05_base, pi05_droid, pi05_libero, pi05_maniskill)}
NAMED_MODELS = f"one of {', '.join(_PRESETS)}, or a JSON file of its configuration"
"""models that `named_model` knows, for a message"""
EXECUTION_FIELDS = ("execution", "frozen_patterns", "decode_unroll", "unstack_layers", "greedy", "prompt_length")
"""fields of a model that say how its distributions are computed, kept in memory, trained and decided by, and how much
text is read, and not which distributions they are"""
_NAMES = {OpenVLAConfig: "OpenVLA", Pi05Config: "pi0.5", MLPConfig: "an MLP"}
_COLOURS = ("mean", "std")
_ROUNDING = 2e-3
"""largest difference of colours' statistics that comes of rounding: published files have them in bfloat16"""


def model_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """Builds a model's configuration from its fields, which tell its kind; raises ConfigError where one is wrong."""
    if not fields:
        raise ConfigError("model: got no fields, expected a configuration, which tells what a checkpoint's weights are")
    return from_dict(_kind(fields), fields, path="model")


def _kind(fields: Mapping[str, Any]) -> type:
    is_pi05 = not {"paligemma", "window", "model_action_dim"}.isdisjoint(fields)
    return Pi05Config if is_pi05 else OpenVLAConfig if "llm" in fields else MLPConfig


def named_model(name: str) -> Pi05Config:
    """Returns the model of pi0.5 that a preset's name, a JSON file or a run's config.json stands for.

    Raises:
        ConfigError: it is none of these.
    """
    if name in _PRESETS:
        return _PRESETS[name]()
    if not (file := home_path(name)).is_file():
        raise ConfigError(f"model: got {name!r}, expected {NAMED_MODELS}")
    fields = read_json(file)
    fields = fields.get("model", fields)
    if not isinstance(fields, dict) or "paligemma" not in fields:
        raise ConfigError(f"{name}: got another content, expected the fields of Pi05Config, or a run's config.json")
    return from_dict(Pi05Config, fields, path=name)


def check_same_model(stored: Mapping[str, Any], wanted: ModelConfig, *, source: Path | str = "the checkpoint") -> None:
    """Makes sure that a model computes the same as a stored one, apart from parameters.

    All fields that the stored one has are compared but those of `EXECUTION_FIELDS`; statistics of the images' colours
    may differ by rounding, tokenizers by the folder that they lie in, and a model may have adapters that the stored one
    does not have.

    Raises:
        ConfigError: names the source, and all fields that differ, one per line: got is stored, expected is wanted.
    """
    if _kind(stored) is not type(wanted):
        raise ConfigError(f"{source}: got weights of {_NAMES[_kind(stored)]}, expected those of {_NAMES[type(wanted)]}")
    if problems := differing_fields(stored, wanted):
        raise ConfigError(f"{source} is of another model:\n  " + "\n  ".join(problems))


def differing_fields(stored: Mapping[str, Any], wanted: ModelConfig) -> list[str]:
    """Returns the fields of a stored model that compute something else than those of one of its kind, in words."""
    stored, fields = (json.loads(json.dumps(tree)) for tree in (stored, to_dict(wanted)))
    problems = []
    for name, got in stored.items():
        expected = fields.get(name)
        if name in EXECUTION_FIELDS or name not in fields or (name == "lora" and got is None):
            continue
        if name == "lora" and expected is not None:
            problems += _compare_adapters(from_dict(LoRAConfig, got, path="lora"), wanted)
        elif name != "tokenizer" or not _is_same_tokenizer(got, expected):
            problems += _compare(f"model.{name}", got, expected)
    return problems


def _compare_adapters(got: LoRAConfig, model: OpenVLAConfig | Pi05Config) -> list[str]:
    """Compares ranks and alphas; the parameters themselves tell which products have adapters."""
    expected = model.lora
    if not (got.overrides or expected.overrides):
        return _compare("model.lora", *({"rank": lora.rank, "alpha": lora.alpha} for lora in (got, expected)))
    problems = []
    modules = openvla_modules(model) if isinstance(model, OpenVLAConfig) else pi05_modules()
    for module in filter(expected.adapts, modules):
        theirs, ours = (
            (lora.rank_of(module), lora.rank_of(module) * lora.scale_of(module)) for lora in (got, expected)
        )
        if ours != theirs:
            problems.append(f"model.lora: {module}: got rank and alpha {theirs}, expected {ours}")
    return problems


def _compare(name: str, got: Any, expected: Any) -> list[str]:
    if isinstance(got, dict) and isinstance(expected, dict):
        fields = [field for field in got if field in expected]
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
