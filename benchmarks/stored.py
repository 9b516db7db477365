"""Policies with random weights, and observations that are stored: what they need to act and learn without simulators.

Shared by `iteration.py`, `openvla.py` and `pi05.py`.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from device import measure
from jax.sharding import Mesh

from stare_jax.envs.base import EnvStep
from stare_jax.envs.toys import ToyEnv, push
from stare_jax.models import Policy
from stare_jax.models.policy import Decision, with_prompt
from stare_jax.rollout.acting import acting_sharding, jit_sample, place_rows, policy_act
from stare_jax.rollout.prepared import prepare_params
from stare_jax.sharding.mesh import batch_sharding, make_mesh, path_name
from stare_jax.state.train_state import abstract_params
from stare_jax.types import Observation, PyTree

NUM_STORED = 64
"""Images that are stored beside one for every environment."""


def random_params(policy: Policy, seed: int, mesh: Mesh | None = None) -> PyTree:
    """Returns random parameters on the devices of a mesh, or on the first; fresh norms and adapters would be off."""

    def one(path, leaf):
        name, scale = path_name(path), 0.02
        if not name.endswith(("bias", "scale", "embedding")) and leaf.ndim > 1:  # a product: its input's axis is first
            scale = leaf.shape[-3 if name.endswith(("query/kernel", "key/kernel", "value/kernel")) else -2] ** -0.5
        # This generator, and even numbers, compile in a fraction of the time of the usual one's normal numbers.
        key = jax.random.key(zlib.crc32(name.encode()) + seed, impl="unsafe_rbg")
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -(3**0.5) * scale, 3**0.5 * scale)

    shapes = abstract_params(policy, make_mesh() if mesh is None else mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(lambda: jax.tree.map_with_path(one, shapes), out_shardings=shardings)()


class StoredEnv(ToyEnv):
    """A toy that shows stored images and states of a policy's shapes; the first numbers of an action move it."""

    def __init__(self, policy: Policy, num_envs: int, *, horizon: int, seed: int = 0):
        """Draws images and states; an episode has `horizon` actions."""
        super().__init__(push.TOY, num_envs)
        self._horizon, self._action_dim, self._calls = horizon, policy.action_dim, itertools.count()
        self._stored = draw_observation(policy, num_envs + NUM_STORED, seed)

    @property
    def horizon(self) -> int:
        return self._horizon

    @property
    def action_dim(self) -> int:
        return self._action_dim

    def send(self, action: np.ndarray, reset_seeds: Any = None, **options: Any) -> None:
        super().send(np.asarray(action)[:, : self.toy.action_dim], reset_seeds, **options)

    def _observe(self, measured: Any) -> EnvStep:
        first = next(self._calls) % NUM_STORED
        step = super()._observe(measured)
        # Owned by the caller, as those of simulators are.
        shown = jax.tree.map(lambda x: x[first : first + self.num_envs].copy(), self._stored)
        return step._replace(observation=shown)


def draw_observation(policy: Policy, num_rows: int, seed: int) -> Observation:
    """Returns random images and states, `[B, ...]` of NumPy, as simulators give them: with empty prompts."""
    shapes, rng = policy.observation_shape(num_rows), np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, x.shape, dtype=np.uint8) for name, x in shapes.images.items()}
    state = rng.uniform(-1, 1, shapes.state.shape).astype(np.float32)
    return Observation(images, state, np.zeros((num_rows, 0), np.int32), np.zeros((num_rows, 0), bool))


def with_stored_prompt(policy: Policy, tokens: np.ndarray) -> Policy:
    """Returns a policy whose prompts are these `[B, L]`, whatever it is told."""
    return policy._replace(tokenize=lambda instructions, state: (tokens, np.ones(tokens.shape, bool)))


class Acting(NamedTuple):
    """Decisions for a batch of observations."""

    decide: Callable[[], Decision]
    """acting, from bytes on the host to actions on the host, through `policy_act`."""
    decide_on_device: Callable[[], Decision]
    """the same program alone: from arrays on the device to arrays on the device."""


def make_acting(
    policy: Policy,
    params: PyTree,
    observation: Observation,
    instructions: Sequence[str],
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> Acting:
    """Returns both ways to decide; they share one compiled program.

    Args:
        policy: policy that acts.
        params: on their devices; prepared here, once for both.
        observation: NumPy leaves `[B, ...]`, with empty prompts.
        instructions: `[B]`.
        temperature: 0 is greedy.
        mesh: devices that act; None takes those of `params`.
    """
    key, is_first = jax.random.key(0), np.zeros(len(instructions), bool)
    params = prepare_params(policy, params)
    act = policy_act(policy, params, key, temperature=temperature, mesh=mesh)
    sharding = acting_sharding(params) if mesh is None else batch_sharding(mesh)
    placed = place_rows(with_prompt(policy, observation, instructions), sharding)
    sample = jit_sample(policy.sample)

    def decide():
        # A collection reads all of it.
        return jax.device_get(act(observation, None, instructions, is_first)[0])

    def decide_on_device():
        return jax.block_until_ready(sample(params, placed, key, np.uint32(0), np.float32(temperature)))

    return Acting(decide, decide_on_device)


def measure_acting(acting: Acting, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of either way, which take turns; both have been run before."""
    seconds: dict[str, list[float]] = {"act": [], "device": []}
    for _ in range(repeats):
        seconds["act"] += measure(acting.decide, 1)
        seconds["device"] += measure(acting.decide_on_device, 1)
    return seconds


def peak_bytes() -> int | None:
    """Returns the most bytes that have been in use on one device; None where its allocator does not count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)
