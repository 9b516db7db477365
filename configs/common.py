"""What all configurations start from: the defaults that live in the code, as one `ConfigDict`."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from stare_jax.config import to_dict
from stare_jax.envs import EnvConfig
from stare_jax.models import OpenVLAConfig, Pi05Config
from stare_jax.runs.config import RunConfig


def base_config(env: EnvConfig, model: OpenVLAConfig | Pi05Config, *, name: str) -> ml_collections.ConfigDict:
    """Returns the whole configuration of a run, every field of which can be overridden as `--config.ppo.gamma=0.98`.

    Args:
        env: the task and its simulators.
        model: the policy.
        name: of the run, which is kept in `runs/<name>` unless `--workdir` says otherwise.
    """
    values = _with_placeholders(RunConfig(env=env, model=model, stages=env.spec.params))
    config = ml_collections.ConfigDict(values, type_safe=False)
    config.name = name
    for section in ("demos", "sft", "pairs", "ppo", "tpo"):
        config[section].seed = config.get_ref("seed")
    return config


def split_variant(variant: str, *, tasks: Sequence[str], words: Sequence[str]) -> tuple[str, set[str]]:
    """Returns the task of a variant such as "StackCube-v1,pi05,full", the first one where none is named, and the rest.

    Args:
        variant: what stands behind the colon of `--config`.
        tasks: environments to choose from.
        words: what else may stand there.

    Raises:
        ValueError: something else does.
    """
    parts = [part for part in variant.split(",") if part]
    named = [part for part in parts if part in tasks]
    if unknown := set(parts) - set(tasks) - set(words):
        raise ValueError(f"variant: got {', '.join(sorted(unknown))}, expected some of {', '.join((*words, *tasks))}")
    if len(named) > 1:
        raise ValueError(f"variant: got {', '.join(named)}, expected one task")
    return (named or list(tasks))[0], set(parts) - set(named)


def _with_placeholders(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested dicts. A field that is None, and may be a number or a tuple, says of which type:
    otherwise it could not be given on the command line."""
    hints, values = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            value = _with_placeholders(value)
        elif value is None and isinstance(hint, types.UnionType):
            (kind,) = (typing.get_origin(part) or part for part in typing.get_args(hint) if part is not types.NoneType)
            value = None if dataclasses.is_dataclass(kind) else config_dict.placeholder(kind)
        else:
            value = to_dict(value)
        values[field.name] = value
    return values
