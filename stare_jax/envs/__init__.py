"""Simulators behind one interface, `VecEnv`. Nothing outside this package imports PyTorch, SAPIEN or ManiSkill."""

from stare_jax.envs.base import EnvStep, VecEnv
from stare_jax.envs.config import STATE_DIMS, EnvConfig
from stare_jax.envs.experts import Expert, execution_noise, make_expert
from stare_jax.envs.workers import SimulatorError, SimulatorPool

__all__ = [
    "STATE_DIMS",
    "EnvConfig",
    "EnvStep",
    "Expert",
    "SimulatorError",
    "VecEnv",
    "execution_noise",
    "make_expert",
    "make_vec_env",
]


def make_vec_env(config: EnvConfig) -> VecEnv:
    """Starts `config.num_envs` simulators in `config.num_workers` processes; close it when done.

    Raises:
        SimulatorError: where one does not start, with its own message and the remedy.
    """
    return SimulatorPool(config)
