"""The interface of an actor, and the playing of decisions that hold several actions."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from stare_jax.models.policy import Decision
from stare_jax.types import Array, Observation, Signals

Act = Callable[[Observation, Signals, Sequence[str], np.ndarray], tuple[Decision, Observation]]
"""act(observation [B], signals [B], instructions [B], is_first bool [B]) -> (Decision [B], the observation to store).

A decision holds one action a row, `[B, A]`, or always the same number C of them, `[B, C, A]`, which are executed one
after the other before `act` is called again. Observations come raw, with empty prompts; a policy returns the one with
its prompt filled in. `is_first` marks the rows that are in the first state of an episode; episodes of one task begin
in the order of their seeds, within one call from the first row to the last, unless groups take turns and have spare
simulators. Rows of environments that have nothing left to do are passed too; decisions for them are not used. Arrays
are those of the simulator, NumPy or JAX, and the decision's may be either.
"""


class Chunk:
    """The actions of one decision in every environment, played one after another."""

    def __init__(self, decision: Decision):
        self._action = decision.action
        self.decision: Decision = jax.device_get(decision)
        """The decision as NumPy arrays."""
        self._is_single = decision.action.ndim == 2
        self.size: int = 1 if self._is_single else decision.action.shape[1]
        """C, actions that the decision executes."""
        self._num_played = 0

    @property
    def is_over(self) -> bool:
        """True once all C actions have been played."""
        return self._num_played == self.size

    def next(self) -> tuple[Array, np.ndarray]:
        """Returns the next action `[B, A]`, as the actor gave it and as a NumPy array."""
        number, self._num_played = self._num_played, self._num_played + 1
        if self._is_single:
            return self._action, self.decision.action
        return self._action[:, number], self.decision.action[:, number]
