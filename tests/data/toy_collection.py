"""Material for tests of collection: the toy environment's expert, and the toy environment with simulators that die."""

import jax
import numpy as np

from stare_jax.envs import toy
from stare_jax.envs.base import SimulatorInfo
from stare_jax.envs.experts.base import Expert


def info_of(env, **changes):
    """Properties of the toy's simulators."""
    return SimulatorInfo(env.env_id, env.horizon, env.num_envs)._replace(**changes)


class SimulatorNeeded(Exception):
    """Raised by `no_simulator`."""


def no_simulator():
    """Starts nothing."""
    raise SimulatorNeeded


def toy_expert(speed=1.0):
    """The toy's expert; its memory counts the steps of the episode."""

    def act(signals, num_steps):
        batch = jax.tree.map(lambda leaf: leaf[None], signals)
        return toy.expert_action(batch, speed=speed)[0], num_steps + 1

    return Expert(lambda: 0, act, (1.0, 1.0))


class MortalToy(toy.ToyPush):
    """The first of its environments dies in some calls, counted from 0, and any that begins one of some seeds."""

    def __init__(self, num_envs, *, dies_in=(), killers=(), is_asleep=False):
        super().__init__(num_envs)
        self.dies_in, self._killers, self._is_asleep, self._num_calls = set(dies_in), killers, is_asleep, 0
        self._is_dead = np.zeros(num_envs, bool)

    def reset(self, seeds, *, reproducible=False):
        assert not self._is_asleep, "it was not to be used"
        state = super().reset(seeds, reproducible=reproducible)
        return self._kill(state, dict(enumerate(seeds)))

    def send(self, action, reset_seeds=None, **options):
        reset_seeds = reset_seeds or {}
        assert set(np.flatnonzero(self._is_dead)) <= set(reset_seeds), "an environment that died was not reset"
        self._reset_seeds = reset_seeds
        super().send(action, reset_seeds, **options)

    def receive(self):
        return self._kill(super().receive(), self._reset_seeds)

    def _kill(self, state, reset_seeds):
        self._is_dead = np.isin(np.arange(self.num_envs), [i for i, s in reset_seeds.items() if s in self._killers])
        if self._num_calls in self.dies_in:
            self._is_dead[0] = True
            self.dies_in.remove(self._num_calls)
        self._num_calls += 1
        return state._replace(alive=~self._is_dead)
