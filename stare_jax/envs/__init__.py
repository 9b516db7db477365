"""Simulators behind one interface, `VecEnv`. Nothing outside this package imports PyTorch, SAPIEN or ManiSkill."""

from stare_jax.envs.base import EnvStep, SimulatorError, VecEnv
from stare_jax.envs.config import BACKENDS, STATE_DIMS, EnvConfig
from stare_jax.envs.experts.base import Expert, execution_noise
from stare_jax.envs.groups import GroupedEnvs
from stare_jax.envs.maniskill.batched import resolve_backend, start_batch
from stare_jax.envs.maniskill.building import MissingAssetsError
from stare_jax.envs.maniskill.vulkan import MissingDeviceError
from stare_jax.envs.pool.workers import SimulatorPool
from stare_jax.envs.tasks import Task, load_task, make_expert
from stare_jax.envs.toys import push as toy

__all__ = [
    "BACKENDS",
    "STATE_DIMS",
    "EnvConfig",
    "EnvStep",
    "Expert",
    "SimulatorError",
    "Task",
    "VecEnv",
    "execution_noise",
    "load_task",
    "make_expert",
    "make_vec_env",
    "toy",
]


def make_vec_env(config: EnvConfig) -> VecEnv:
    """Starts `config.num_envs` environments; close it when done.

    With `config.backend == "cpu"` they run in `config.num_workers` processes and give NumPy arrays; with "cuda" they
    are one batch on the GPU and give JAX arrays that lie there. "auto" is resolved
    here, and printed.

    Raises:
        SimulatorError: where they do not start, with the reason and the remedy.
    """
    config = resolve_backend(config)
    if config.backend == "cpu" and config.num_groups > 1:
        return GroupedEnvs(SimulatorPool(config.of_group) for _ in range(config.num_groups))
    if config.backend == "cpu":
        return SimulatorPool(config)
    try:
        return start_batch(config)
    except (MissingDeviceError, MissingAssetsError) as error:
        raise SimulatorError(f"{config.env_id}: {error}") from error
