"""Who acts, and the playing of decisions that hold several actions."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from stare_jax.envs.base import EnvStep
from stare_jax.models.policy import Decision
from stare_jax.types import Observation, Signals

Act = Callable[[Observation, Signals, Sequence[str], np.ndarray], tuple[Decision, Observation]]
"""act(observation [B], signals [B], instructions [B], is_first bool [B]) -> (Decision [B], the observation to store).

A decision holds one action a row, `[B, A]`, or always the same number C of them, `[B, C, A]`, which are executed one
after the other before `act` is asked again. Observations come raw, with empty prompts; a policy stores the one with its
prompt filled in. `is_first` marks the rows that are in the first state of an episode; episodes begin in the order of
their seeds, within one call from the first row to the last. Rows of environments that have nothing left to do are asked
about, too; what is decided there is not used. Arrays are those of the simulator, NumPy or JAX, and what is decided may
be either.
"""


class Decisions:
    """Asks who acts, and plays what was decided, action by action."""

    def __init__(self, act: Act):
        self._act = act
        self._decided: tuple[Decision, Observation] | None = None
        self._num_played = 0
        self.chunk = 1

    @property
    def is_new(self) -> bool:
        """Whether the last answer was a decision's first action."""
        return self._num_played == 1

    @property
    def are_executed(self) -> bool:
        """Whether the next answer will be."""
        return self._num_played == self.chunk

    def next(
        self, state: EnvStep, instructions: Sequence[str], is_first: np.ndarray, *, needs_value: np.ndarray
    ) -> tuple[Decision, Observation]:
        """Returns what is to be done in a state, one action a row, and the observation to store.

        Args:
            state: of the environments.
            instructions: of each.
            is_first: as `Act` gets it.
            needs_value: bool `[B]`, rows whose value has to be known, also where nothing new is to be decided.
        """
        is_new = self._decided is None or self.are_executed
        asked = None
        if is_new or needs_value.any():
            asked = self._act(state.observation, state.signals, instructions, is_first)
        if is_new:
            self._decided, self._num_played = asked, 0
            self.chunk = asked[0].action.shape[1] if asked[0].action.ndim == 3 else 1
        decision, seen = self._decided
        action = decision.action[:, self._num_played] if decision.action.ndim == 3 else decision.action
        self._num_played += 1
        if is_new:
            return decision._replace(action=action), seen
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), decision._replace(action=()))
        value = nothing.value if asked is None else np.where(needs_value, asked[0].value, nothing.value)
        no_prompt = {"tokens": np.zeros_like(seen.tokens), "token_mask": np.zeros_like(seen.token_mask)}
        return nothing._replace(action=action, value=value), state.observation._replace(**no_prompt)
