"""The interface of simulators: a batch of environments that step together and reset one by one."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from stare_jax.config import UserError
from stare_jax.types import Array, Observation, Signals


class SimulatorError(UserError, RuntimeError):
    """Simulators that do not start, are lost more often than `max_restarts` allows, never come back, or lose all
    episodes."""


class EnvStep(NamedTuple):
    """The state each environment is in after a call; leaves are `[B, ...]`, owned by the caller.

    They are NumPy; or JAX, all of them, where the simulator's own arrays are on a device.
    """

    observation: Observation
    """raw, with empty prompts (`L = 0`), which are NumPy."""
    signals: Signals
    alive: np.ndarray
    """NumPy bool `[B]`: False where the simulator raised an error, died or hung in this call, or has not started again
    since. Its episode is lost, the row's other values mean nothing, and the environment has to be reset next: calls
    that reset it before it has started leave it as it is. Where none is alive, a call waits for one to start: a
    collection gives up after `rollout.collect.MAX_DEAD_CALLS` such calls in a row."""


class SimulatorInfo(NamedTuple):
    """The properties of simulators that collected episodes depend on; known before any simulator has started."""

    env_id: str
    """name of the task; of several tasks all names, joined by "+"."""
    horizon: int
    """actions of an episode."""
    num_envs: int
    control_mode: str = ""
    """meaning of an action."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """all else, JSON-able."""


class VecEnv(Protocol):
    """`num_envs` environments of one task, or of several, in lock-step.

    A step is in two parts, between which the caller can do something else: `send` resets the environments named in
    `reset_seeds` (index -> seed) and steps all the others with their row of `action`, and `receive` waits for the
    states. Rows of environments that are reset are ignored. An environment never resets itself. One that is idle has
    nothing to do until it is reset: it need not be stepped, and its state means nothing.
    """

    env_id: str
    num_envs: int
    horizon: int
    action_dim: int
    task_index: np.ndarray
    """int `[B]`, the task of each environment, from 0; read only where episodes are of several tasks."""
    instructions: Sequence[str]
    """`[B]`, one for each current episode; those of episodes that begin are there after `send`."""

    @property
    def groups(self) -> Sequence["VecEnv"]:
        """Parts of the environments that can be stepped one without the other, in order; itself where it has none."""
        return (self,)

    @property
    def spare_of_env(self) -> np.ndarray | None:
        """int `[B]`, the spare simulator that can take the place of each environment; None where there is none."""
        return None

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        """Resets all environments, after waiting for those that are being restarted.

        States that were sent for and not received are dropped.

        Args:
            seeds: `[B]`.
            reproducible: ask for resets, slower ones, after which equal actions give equal states; not every simulator
                has them.
        """
        ...

    def send(
        self,
        action: Array,
        reset_seeds: Mapping[int, int] | None = None,
        *,
        reproducible: bool = False,
        is_idle: np.ndarray | None = None,
        is_drawn: np.ndarray | None = None,
        next_seeds: Mapping[int, int] | None = None,
    ) -> None:
        """Begins to step and to reset; the next call is `receive`, or a `reset` of all.

        Args:
            action: float32 `[B, A]` in the simulator's units, of NumPy; also of JAX where states are JAX arrays.
            reset_seeds: environment -> seed of the episode to begin.
            reproducible: as for `reset`.
            is_idle: NumPy bool `[B]`: environments that have nothing to do; None for none of them.
            is_drawn: NumPy bool `[B]`: environments whose images somebody will look at, None for all of them; those of
                others may be older ones. Environments that are reset are drawn.
            next_seeds: spare simulator -> seed of the episode that it begins once the states are there, so that the
                environment that is reset with this seed has it at once.
        """
        ...

    def receive(self) -> EnvStep:
        """Waits for what was sent, and returns the states."""
        ...

    def step(
        self,
        action: Array,
        reset_seeds: Mapping[int, int] | None = None,
        *,
        reproducible: bool = False,
        is_idle: np.ndarray | None = None,
        is_drawn: np.ndarray | None = None,
        next_seeds: Mapping[int, int] | None = None,
    ) -> EnvStep:
        """Steps and resets: `send` and `receive` in one call."""
        options = {"is_idle": is_idle, "is_drawn": is_drawn, "next_seeds": next_seeds}
        self.send(action, reset_seeds, reproducible=reproducible, **options)
        return self.receive()

    def close(self) -> None: ...
