"""Trained policies on disk, for evaluation, collection and notebooks: phases of runs, and converted folders."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from stare_jax.config import ConfigError, from_dict
from stare_jax.documents import read_json
from stare_jax.envs import load_task
from stare_jax.models import ModelConfig, Policy, make_policy
from stare_jax.models.prompts import with_short_prompts
from stare_jax.runs.config import RunConfig
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.checkpoint import fingerprint, load_norm_stats, load_params, resolve_step
from stare_jax.state.train_state import CHECKPOINTS, abstract_params
from stare_jax.types import PyTree
from stare_jax.weights.load import stands_alone, stored_model

CONFIG_FILE = "config.json"
"""Name of the file that makes a folder a run directory."""


class LoadedPolicy(NamedTuple):
    """A policy and its weights."""

    config: RunConfig | None
    """configuration of the run; None where the weights were converted and no run has trained them."""
    policy: Policy
    params: PyTree


def load_config(run_directory: str | Path) -> RunConfig:
    """Returns the configuration of a run; fields that were added since it was written have their defaults.

    Raises:
        ConfigError: the directory is not that of a run, its task's file is not there, or its configuration has a field
            that no longer exists.
    """
    file = Path(run_directory) / CONFIG_FILE
    if not file.exists():
        raise ConfigError(f"{run_directory}: expected a run directory; {file} does not exist")
    values = read_json(file)
    env = values.get("env")
    env = env if isinstance(env, dict) else {}
    tasks = env.get("tasks") if isinstance(env.get("tasks"), list) else []
    for name in [env.get("task"), *(name for name in tasks if str(name).endswith(".py"))]:
        if name and isinstance(name, str):
            load_task(name)  # A file of the user's is missing or broken by no other version of the library.
    return of_this_version(RunConfig, values, file)


def of_this_version(cls: type, values: Mapping[str, Any], file: Path) -> Any:
    """Returns a dataclass built from JSON that an older version of this library may have written.

    Raises:
        ConfigError: names the file and the field that does not exist any more, or does not take its value.
    """
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(
            f"{file}: was written by another version of stare_jax: {error}; a new run can start from its weights "
            "(config.init_from, the folder of a phase), and converted weights can be converted again"
        ) from error


def identify_checkpoint(folder: str | Path, *, step: int | None = None) -> tuple[int, str]:
    """Returns the step of a checkpoint and its name, such as `sft/500/3f0a5e9c11d2`.

    It consists of phase, step and fingerprint: it is the same wherever the run lies, and no other weights have it.

    Args:
        folder: a phase of a run, or a folder that `launch/convert.py` has written.
        step: step of the checkpoint; None takes the latest.

    Raises:
        CheckpointError: no such checkpoint.
    """
    checkpoints = Path(folder) / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    return step, f"{Path(folder).resolve().name}/{step}/{fingerprint(checkpoints, step=step)}"


def identify_folder(folder: Path) -> str:
    """Returns a name for a folder of weights in another format, which changes where a file comes, goes or grows."""
    places = os.walk(folder, followlinks=True)  # parts of it may lie on another disk
    files = sorted(path for place, _, names in places for path in map(Path(place).joinpath, names) if path.is_file())
    sizes = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    return f"{folder.resolve().name}/{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:12]}"


def load_policy(
    folder: str | Path, *, step: int | None = None, mesh: Mesh | None = None, instructions: Sequence[str] = ()
) -> LoadedPolicy:
    """Returns a policy with the statistics and the weights of its checkpoint.

    Args:
        folder: a phase of a run, such as `runs/quickstart/ppo`, or a folder that `launch/convert.py` has written.
        step: step of the checkpoint; None takes the latest.
        mesh: devices for the weights; None takes one.
        instructions: all that the policy will read, which then pads prompts no further than these need; without any,
            or where one does not fit, to the `prompt_length` of the model.

    Raises:
        ConfigError: neither a phase of a run nor a converted folder.
        CheckpointError: no such checkpoint.
    """
    folder = Path(folder)
    checkpoints = folder / CHECKPOINTS
    is_phase = not stands_alone(folder) and (folder.parent / CONFIG_FILE).exists()
    config = load_config(folder.parent) if is_phase else None
    model = _stored_model(folder, step, config)
    with contextlib.suppress(ValueError):  # of a prompt, which the policy raises where it is to read it
        model = with_short_prompts(model, instructions)
    policy = make_policy(model, load_norm_stats(checkpoints, step=step))
    like = abstract_params(policy, mesh or make_mesh(data=1))
    return LoadedPolicy(config, policy, load_params(checkpoints, like, step=step))


@dataclasses.dataclass(frozen=True)
class _Stored:
    model: ModelConfig


def _stored_model(folder: Path, step: int | None, config: RunConfig | None) -> ModelConfig:
    """Returns the configuration of the model in a checkpoint's metadata, or the run's where it is not there."""
    resolve_step(folder / CHECKPOINTS, step)
    values = stored_model(folder, step=step)
    if values:
        return of_this_version(_Stored, {"model": values}, folder).model
    if config is None:
        raise ConfigError(
            f"{folder}: expected a phase of a run or a converted folder; its checkpoint does not say of which model it "
            f"is, and {folder.parent / CONFIG_FILE} does not exist"
        )
    return config.model
