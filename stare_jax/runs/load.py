"""A trained policy from a run directory, for whoever wants to use it: evaluation, collection, notebooks."""

import json
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from stare_jax.config import ConfigError, from_dict
from stare_jax.models import Policy, make_policy
from stare_jax.runs.config import RunConfig
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.checkpoint import fingerprint, load_norm_stats, load_params, resolve_step
from stare_jax.state.train_state import CHECKPOINTS, abstract_params
from stare_jax.types import PyTree


class LoadedPolicy(NamedTuple):
    config: RunConfig
    policy: Policy
    params: PyTree


def load_config(run_directory: str | Path) -> RunConfig:
    """Returns the configuration of a run.

    Raises:
        ConfigError: the directory is not that of a run.
    """
    file = Path(run_directory) / "config.json"
    if not file.exists():
        raise ConfigError(f"{run_directory}: expected a run directory; {file} does not exist")
    return from_dict(RunConfig, json.loads(file.read_text()))


def identify_checkpoint(phase_directory: str | Path, *, step: int | None = None) -> tuple[int, str]:
    """Returns the step of a checkpoint, the latest if None, and its name: phase, step and fingerprint.

    The name, `sft/500/3f0a5e9c11d2`, is the same wherever the run lies, and no other weights have it.

    Raises:
        CheckpointError: no such checkpoint.
    """
    checkpoints = Path(phase_directory) / CHECKPOINTS
    step = resolve_step(checkpoints, step)
    return step, f"{Path(phase_directory).resolve().name}/{step}/{fingerprint(checkpoints, step=step)}"


def load_policy(phase_directory: str | Path, *, step: int | None = None, mesh: Mesh | None = None) -> LoadedPolicy:
    """Returns the policy of a phase, with the statistics and the weights of its checkpoint.

    Args:
        phase_directory: such as `runs/quickstart/ppo`.
        step: which checkpoint; None takes the latest.
        mesh: where the weights go; None takes one device.

    Raises:
        ConfigError: not a phase of a run.
        CheckpointError: no such checkpoint.
    """
    phase_directory = Path(phase_directory)
    config = load_config(phase_directory.parent)
    checkpoints = phase_directory / CHECKPOINTS
    policy = make_policy(config.model, load_norm_stats(checkpoints, step=step))
    like = abstract_params(policy, mesh or make_mesh(data=1))
    return LoadedPolicy(config, policy, load_params(checkpoints, like, step=step))
