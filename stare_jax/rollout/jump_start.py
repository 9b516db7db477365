"""Episodes in which an expert does the first stages, and the policy takes over where a later one begins."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax.config import Fraction, check_fields
from stare_jax.envs.base import EnvStep, VecEnv
from stare_jax.envs.experts.base import Expert
from stare_jax.stages import StageCarry, TaskSpec, TaskSpecs, as_specs, by_task, step_stage
from stare_jax.types import Array, Signals


@dataclasses.dataclass(frozen=True)
class JumpStartConfig:
    """Share of training episodes that begin, for the policy, in a later stage; after jump-start reinforcement learning
    (Uchendu et al., 2022), whose guide is another policy and hands over after a number of steps."""

    fraction: Fraction = 0.0
    """share of the episodes, below 1, in which the task's expert acts until a later stage has begun, each of them
    equally often. Its actions are simulated, and count as steps, but nothing is learnt from them."""

    def __post_init__(self):
        check_fields(self)
        if self.fraction == 1.0:
            raise ValueError("fraction: got 1.0, expected less: nothing would be learnt of the first stage")


def draw_stages(config: JumpStartConfig, seeds: Sequence[int], num_stages: int) -> np.ndarray:
    """Returns the stage in which the policy takes over, int32 `[E]`; 0 where it acts from the first state on.

    Args:
        config: see `JumpStartConfig`.
        seeds: of the episodes; equal seeds have equal stages.
        num_stages: K.
    """

    def draw(seed):
        # A stream of its own: simulators and noise of experts draw from the same seed.
        rng = np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(2,)))
        return rng.integers(1, num_stages) if rng.random() < config.fraction else 0

    return np.array([draw(seed) for seed in seeds], np.int32)


def lead(env: VecEnv, spec: TaskSpecs, experts: Sequence[Expert], config: JumpStartConfig, *, chunk: int = 1) -> VecEnv:
    """Returns environments in which experts act until the stage of `draw_stages` has begun; `env` with no such episode.

    Actions that are sent before are not executed. Whoever records them records those of the policy, not the expert's.
    An expert goes on to the end of a chunk: the policy decided on the rest of it in a state before the stage.

    Args:
        env: environments whose episodes are over.
        spec: the task, or all in the order of `env.task_index`.
        experts: one a task.
        config: see `JumpStartConfig`.
        chunk: actions of a decision, the first of which is on an episode's first state.

    Raises:
        ValueError: there is not one expert a task, or no later stage.
    """
    specs = as_specs(spec)
    if not config.fraction:
        return env
    if specs[0].num_stages < 2:
        raise ValueError(f"fraction: got {config.fraction} for a task of one stage, expected 0: there is no later one")
    if len(experts) != len(specs):
        raise ValueError(f"experts: got {len(experts)}, expected one for each of {len(specs)} tasks")
    return LedEnvs(env, specs, experts, lambda seed: int(draw_stages(config, [seed], specs[0].num_stages)[0]), chunk)


@functools.lru_cache(maxsize=4)
def _jit_step_stage(specs: tuple[TaskSpec, ...]) -> Callable:
    """Returns (task [B], stages completed [B], signals [B]) -> (stages completed, label), compiled once."""
    one = by_task(specs, lambda spec, completed, signals: step_stage(spec, StageCarry(completed), signals))
    return jax.jit(jax.vmap(one))


class LedEnvs(VecEnv):
    """`VecEnv` of other environments, in which experts act until a stage has begun, whatever action is sent."""

    def __init__(
        self,
        env: VecEnv,
        specs: tuple[TaskSpec, ...],
        experts: Sequence[Expert],
        stage_of: Callable[[int], int],
        chunk: int = 1,
    ):
        """Waits for the environments' next episodes.

        Args:
            env: B environments.
            specs: the tasks, in the order of `env.task_index`.
            experts: one a task.
            stage_of: seed of an episode -> the stage until which its expert acts; 0 for none.
            chunk: see `lead`.
        """
        self._env, self._experts, self._stage_of, self._chunk = env, experts, stage_of, chunk
        self.env_id, self.num_envs = env.env_id, env.num_envs
        self.horizon, self.action_dim, self.task_index = env.horizon, env.action_dim, env.task_index
        self._groups = [LedEnvs(group, specs, experts, stage_of, chunk) for group in env.groups if group is not env]
        self._step_stage = _jit_step_stage(specs)
        self._until, self._completed, self._t = (np.zeros(env.num_envs, np.int32) for _ in range(3))
        self._is_led = np.zeros(env.num_envs, bool)
        self._memories = [None] * env.num_envs

    @property
    def groups(self) -> Sequence[VecEnv]:
        return self._groups or (self,)

    @property
    def spare_of_env(self) -> np.ndarray | None:
        return self._env.spare_of_env

    @property
    def instructions(self) -> Sequence[str]:
        return self._env.instructions

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        self._begin(dict(enumerate(seeds)))
        return self._watch(self._env.reset(seeds, reproducible=reproducible))

    def send(
        self,
        action: Array,
        reset_seeds: Mapping[int, int] | None = None,
        *,
        is_idle: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        is_led = self._is_led & self._alive & (True if is_idle is None else ~is_idle)
        if is_led.any():
            action = np.array(action, np.float32)
        for i in np.flatnonzero(is_led):
            signals = Signals(*(leaf[i] for leaf in self._signals))
            action[i], self._memories[i] = self._expert(i).act(signals, self._memories[i])
        self._t += 1
        self._begin(reset_seeds or {})
        self._env.send(action, reset_seeds, is_idle=is_idle, **options)

    def receive(self) -> EnvStep:
        return self._watch(self._env.receive())

    def close(self) -> None:
        self._env.close()

    def _expert(self, i: int) -> Expert:
        return self._experts[int(self.task_index[i]) if len(self._experts) > 1 else 0]

    def _begin(self, seeds: Mapping[int, int]) -> None:
        """Notes that episodes of some seeds begin in some environments."""
        for i, seed in seeds.items():
            self._until[i], self._completed[i], self._t[i] = self._stage_of(seed), 0, 0
            self._is_led[i] = self._until[i] > 0
            self._memories[i] = self._expert(i).init()

    def _watch(self, state: EnvStep) -> EnvStep:
        """Labels the states that have come, and returns them."""
        self._alive, self._signals = jax.device_get((state.alive, state.signals))
        task = np.asarray(self.task_index, np.int32)
        carry, stage = jax.device_get(self._step_stage(task, self._completed, self._signals))
        # States of dead environments mean nothing.
        self._completed = np.where(self._alive, carry.num_completed, self._completed)
        # What is left of a chunk was decided on before the stage began.
        self._is_led &= ~(self._alive & (stage >= self._until) & (self._t % self._chunk == 0))
        return state
