"""Several batches of environments as one, which can also be stepped one without the other."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from stare_jax.envs.base import EnvStep, VecEnv


class GroupedEnvs(VecEnv):
    """`VecEnv` of the environments of several, its `groups`, one after another. Their arrays are NumPy."""

    def __init__(self, groups: Iterable[VecEnv]):
        """Takes over environments of the same task or tasks; those that a failure leaves half started are closed."""
        self._groups: list[VecEnv] = []
        try:
            self._groups.extend(groups)
        except BaseException:
            self.close()
            raise
        first = self._groups[0]
        self.env_id, self.horizon, self.action_dim = first.env_id, first.horizon, first.action_dim
        self.num_envs = sum(group.num_envs for group in self._groups)
        self.task_index = np.concatenate([group.task_index for group in self._groups])

    @property
    def groups(self) -> Sequence[VecEnv]:
        return self._groups

    @property
    def instructions(self) -> Sequence[str]:
        return [instruction for group in self._groups for instruction in group.instructions]

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        if len(seeds) != self.num_envs:
            raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {self.num_envs} environments")
        return _join([group.reset(seeds[rows], reproducible=reproducible) for group, rows in self._rows()])

    def send(
        self,
        action: np.ndarray,
        reset_seeds: Mapping[int, int] | None = None,
        *,
        reproducible: bool = False,
        is_idle: np.ndarray | None = None,
        is_drawn: np.ndarray | None = None,
        next_seeds: Mapping[int, int] | None = None,
    ) -> None:
        del next_seeds  # The groups' own spare simulators are of use to them alone.
        reset_seeds = reset_seeds or {}
        if not all(0 <= i < self.num_envs for i in reset_seeds):
            raise ValueError(f"reset_seeds: got {sorted(reset_seeds)}, expected indices below {self.num_envs}")
        # All is checked before any group is sent for: those that were would wait to be received.
        with np.errstate(over="ignore"):
            action = np.asarray(action, np.float32)
        if action.shape != (self.num_envs, self.action_dim):
            raise ValueError(f"action: got shape {action.shape}, expected {(self.num_envs, self.action_dim)}")
        is_stepped = np.ones(self.num_envs, bool) if is_idle is None else ~np.asarray(is_idle)
        is_stepped[list(reset_seeds)] = False
        if not np.isfinite(action[is_stepped]).all():
            raise ValueError(f"action: got {action.tolist()}, expected finite numbers")
        for group, rows in self._rows():
            seeds = {i - rows.start: seed for i, seed in reset_seeds.items() if rows.start <= i < rows.stop}
            idle, drawn = (None if given is None else given[rows] for given in (is_idle, is_drawn))
            group.send(action[rows], seeds, reproducible=reproducible, is_idle=idle, is_drawn=drawn)

    def receive(self) -> EnvStep:
        return _join([group.receive() for group in self._groups])

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # All are closed, whatever one of them raises.
            for group in self._groups:
                stack.callback(group.close)

    def _rows(self) -> Iterator[tuple[VecEnv, slice]]:
        """Yields groups and the rows that they have."""
        first = 0
        for group in self._groups:
            yield group, slice(first, first + group.num_envs)
            first += group.num_envs


def _join(states: Sequence[EnvStep]) -> EnvStep:
    """Returns the states of all groups as those of one batch."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)
