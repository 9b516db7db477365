"""`VecEnv` over the pure functions of a toy, all on the device that JAX computes on."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.base import EnvStep, VecEnv
from stare_jax.envs.state import observed_state
from stare_jax.envs.toys.drawing import View, draw
from stare_jax.stages.spec import TaskSpec
from stare_jax.types import Array, NormStats, Observation


class Toy(NamedTuple):
    """A task of one environment as pure functions; none is jitted. A is the number of an action's numbers, S of a
    state's."""

    env_id: str
    instruction: str
    horizon: int
    """actions of an episode."""
    action_dim: int
    state_dim: int
    max_step: float
    """metres that the gripper moves at most along each axis in a step; smaller steps make the task longer."""
    reset: Callable
    """`reset(seed) -> state`, a pytree of arrays; the seed is uint32."""
    step: Callable
    """`step(state, action [A], *, max_step) -> state`; the action is clipped to [-1, 1]."""
    observe: Callable
    """`observe(state) -> (observed state [S], Signals)`."""
    expert: Callable
    """`expert(signals [B, ...], *, speed=1.0, max_step) -> action float32 [B, A]`, of NumPy or JAX as the signals are.
    It follows from the observed state alone. `speed` is the fraction of the largest step that it uses."""
    spec: TaskSpec
    norm_stats: NormStats
    opening: Callable
    """`opening(state) -> metres between the fingers`."""
    shapes: Callable
    """`shapes(state) -> drawing.Shape of everything`, the later ones over the earlier."""
    view: View
    """the part of the plane that pictures show."""


CAMERA = "base_camera"
"""The name of the pictures, that of ManiSkill's Panda, so that policies see toys without a change."""


class ToyEnv(VecEnv):
    """`num_envs` environments of a toy; see `envs.base.VecEnv`."""

    def __init__(self, toy: Toy, num_envs: int, *, use_state: str | None = None, image_shape: tuple[int, int] = (0, 0)):
        """
        Args:
            toy: the task.
            num_envs: environments.
            use_state: as in `EnvConfig`; None for the toy's own state.
            image_shape: (height, width) of the pictures in pixels, zeros for none.
        """
        self.toy = toy
        self.num_envs = num_envs
        self.task_index = np.zeros(num_envs, int)
        self.instructions = (toy.instruction,) * num_envs
        look = _look(toy.observe, toy.opening, toy.shapes, toy.view, use_state, image_shape)
        self._reset, self._step = _compile(toy.reset, toy.step, look, toy.max_step)

    @property
    def env_id(self) -> str:
        return self.toy.env_id

    @property
    def horizon(self) -> int:
        return self.toy.horizon

    @property
    def action_dim(self) -> int:
        return self.toy.action_dim

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        del reproducible  # Every reset is.
        if len(seeds) != self.num_envs:
            raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {self.num_envs} environments")
        self._state, self._measured = self._reset(np.asarray(seeds, np.uint32))
        return self._observe(self._measured)

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
        del reproducible, is_idle, is_drawn, next_seeds  # All step together, and are drawn in the same program.
        seeds, is_reset = np.zeros(self.num_envs, np.uint32), np.zeros(self.num_envs, bool)
        for i, seed in (reset_seeds or {}).items():
            seeds[i], is_reset[i] = seed, True
        self._state, self._measured = self._step(self._state, np.asarray(action, np.float32), seeds, is_reset)

    def receive(self) -> EnvStep:
        return self._observe(self._measured)

    def close(self) -> None:
        self._state = self._measured = None

    def _observe(self, measured) -> EnvStep:
        images, state, signals = jax.device_get(measured)
        no_tokens = np.zeros((self.num_envs, 0), np.int32)
        observation = Observation(images=images, state=state, tokens=no_tokens, token_mask=no_tokens.astype(bool))
        return EnvStep(observation, signals, np.ones(self.num_envs, bool))


@functools.lru_cache(maxsize=16)
def _look(
    observe: Callable,
    opening: Callable,
    shapes: Callable,
    view: View,
    use_state: str | None,
    image_shape: tuple[int, int],
) -> Callable:
    """Returns `look(state) -> (images, observed state, signals)` of one environment; equal arguments, one function."""

    def look(state):
        observed, signals = observe(state)
        if use_state is not None:
            observed = observed_state(use_state, signals, opening(state))
        images = {CAMERA: draw(shapes(state), view, *image_shape)} if all(image_shape) else {}
        return images, observed, signals

    return look


@functools.lru_cache(maxsize=16)
def _compile(reset_fn: Callable, step_fn: Callable, observe_fn: Callable, max_step: float) -> tuple[Callable, Callable]:
    """Returns reset and step of a batch, jitted once for all environments of a toy."""

    @jax.jit
    def reset(seeds):
        state = jax.vmap(reset_fn)(seeds)
        return state, jax.vmap(observe_fn)(state)

    @jax.jit
    def step(state, action, seeds, is_reset):
        def one(state, action, seed, is_reset):
            moved, fresh = step_fn(state, action, max_step=max_step), reset_fn(seed)
            return jax.tree.map(lambda a, b: jnp.where(is_reset, a, b), fresh, moved)

        state = jax.vmap(one)(state, action, seeds, is_reset)
        return state, jax.vmap(observe_fn)(state)

    return reset, step


def unit_vector(offset: Array) -> Array:
    """Returns vectors `[..., D]` of length 1, or shorter where the offset is below a micrometre; NumPy or JAX."""
    xp = array_module(offset)
    return offset / xp.maximum(xp.linalg.norm(offset, axis=-1, keepdims=True), 1e-6)


def array_module(array: Array):
    """Returns the module, `jax.numpy` or `numpy`, that an array belongs to."""
    return jnp if isinstance(array, jax.Array) else np


def bounded(action: Array, speed: float) -> Array:
    """Returns actions `[..., A]` whose largest number is at most `speed`, in the direction that was asked for."""
    xp = array_module(action)
    return speed * action / xp.maximum(xp.abs(action).max(axis=-1, keepdims=True), 1.0)
