"""What the library asks of a simulator: a batch of environments that step together and reset one by one."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stare_jax.config import UserError
from stare_jax.types import Array, Observation, Signals


class SimulatorError(UserError, RuntimeError):
    """A simulator that could not be started, or raised while it executed a command, or lost all of its episodes."""


class EnvStep(NamedTuple):
    """The state each environment is in after a call; leaves are `[B, ...]`, owned by the caller.

    They are NumPy; or JAX, all of them, where the simulator's own arrays are on a device.
    """

    observation: Observation
    """raw, with empty prompts (`L = 0`), which are NumPy."""
    signals: Signals
    alive: np.ndarray
    """NumPy bool `[B]`: False where the simulator died or hung in this call. It has been restarted; its episode is
    lost, the row's other values mean nothing, and the environment has to be reset next."""


class VecEnv(Protocol):
    """`num_envs` environments of one task in lock-step.

    `step` resets the environments named in `reset_seeds` (index -> seed) and steps all the others with their row of
    `action`; rows of environments that are reset are ignored. An environment never resets itself.
    """

    env_id: str
    num_envs: int
    horizon: int
    action_dim: int
    instructions: Sequence[str]
    """`[B]`, of the current episodes."""

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        """Resets all environments. `reproducible` pays for a reset after which equal actions give equal states, where
        the simulator has such a reset."""
        ...

    def step(
        self, action: Array, reset_seeds: Mapping[int, int] | None = None, *, reproducible: bool = False
    ) -> EnvStep:
        """Steps with float32 `[B, A]` actions in the simulator's units; `reproducible` is about the resets.

        Where states are JAX arrays, actions may be, too; NumPy is always understood.
        """
        ...

    def close(self) -> None: ...
