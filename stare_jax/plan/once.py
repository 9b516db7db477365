"""One decision of a model of full size on this machine's processor, with random weights: sampled, then scored.

It needs neither an accelerator nor a simulator, and no file. What it compares is what PPO's first ratio is made of.
"""

import contextlib
import dataclasses
import math
import re
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.config import ConfigError
from stare_jax.logging import PeakMemory, announced, available_bytes
from stare_jax.models import MLPConfig, ModelConfig
from stare_jax.models.blank import blank_policy
from stare_jax.models.policy import Policy
from stare_jax.rollout.acting import jit_sample
from stare_jax.rollout.prepared import prepare_params, prepared_shapes
from stare_jax.runs.config import RunConfig
from stare_jax.sharding.mesh import path_name
from stare_jax.state.storage import num_bytes
from stare_jax.types import Observation, PyTree

_NUM_IDS = 64
"""ids of tokens that prompts are drawn from; every vocabulary has more"""
_SMALL = 0.02
"""deviation of biases, and of scales around one"""
_BLOCK_SIZE = 4_000_037
"""numbers that are drawn; a prime, so that no two layers begin at the same of them"""
_INPUT_AXES = (
    (r"((q|k|v)_proj|query|key|value)/kernel$", (-3,)),
    (r"qkv/kernel$", (-4,)),
    (r"(o_proj|/proj|_0/out)/kernel$|attn_vec_einsum(_1)?/w$", (-3, -2)),
    (r"(patch_embed|embedding|conv_\d)/kernel$", (-4, -3, -2)),
)
"""regex -> axes of a weight that a product sums over, where it is not the last but one alone."""


class Once(NamedTuple):
    """One decision and what it took."""

    num_params: int
    weights: int
    """bytes of them."""
    dtype: str
    """type of products and weights."""
    seconds: dict[str, float]
    """time of each part, in the order in which they were done."""
    peak: int | None
    """most bytes that the process held; None where the system does not say."""
    sampled: np.ndarray
    """float32 `[T]`, terms of the log-probability as the rollout has them."""
    scored: np.ndarray
    """float32 `[T]`, the same as the update computes them."""

    @property
    def difference(self) -> float:
        """Log-probability of the decision by its score, minus that of the rollout, in nats."""
        return float((self.scored - self.sampled).sum())

    @property
    def agrees(self) -> bool:
        """Says that the two differ by no more than rounding does: 1e-3 nats in float32, 1 in types of 16 bits."""
        return abs(self.difference) <= (1e-3 if self.dtype == "float32" else 1.0)


def decide_once(config: RunConfig) -> Once:
    """Makes one decision for one row of random images, states and tokens, and scores it.

    Weights are in the type of the products, also those that a run trains in float32: the products are the same.

    Raises:
        ConfigError: this machine has not enough memory for it.
    """
    model = _in_one_type(config.model)
    policy, temperature = blank_policy(model), np.float32(config.ppo.temperature)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    weights, seconds = num_bytes(params), {}
    check_memory(weights)

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.monotonic()
        with announced(part):
            yield
        seconds[part] = time.monotonic() - start

    with PeakMemory() as memory:
        with timed("compiling"):
            programs = _compile(policy, params, temperature)
            check_memory(programs.num_bytes)
        with timed("drawing weights"):
            params = draw_params(params)
            prepared = jax.block_until_ready(prepare_params(policy, params))
        observation = _draw_observation(policy)
        with timed("sampling"):
            decision = programs.sample(prepared, observation, jax.random.key(1), np.uint32(0), temperature)
            sampled = np.asarray(decision.logp)[0]
        with timed("scoring"):
            scored = np.asarray(programs.score(params, observation, decision.trace, temperature))[0]
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Once(num_params, weights, policy.compute_dtype, seconds, memory.peak, sampled, scored)


def check_memory(needed: float) -> None:
    """Raises ConfigError unless this machine has so many bytes left; nothing where the system does not say."""
    have = available_bytes()
    if have is not None and needed > have:
        raise ConfigError(
            f"--run-once: got {have / 1e9:.2f} GB of free memory, expected at least {needed / 1e9:.2f} GB"
        )


class _Programs(NamedTuple):
    sample: jax.stages.Compiled
    score: jax.stages.Compiled
    num_bytes: int
    """bytes that are in use at once, at most."""


def _compile(policy: Policy, params: PyTree, temperature: np.float32) -> _Programs:
    """Compiles all that a decision takes from the shapes of its parameters."""
    prepared, made = prepared_shapes(policy, params)
    observation, key = policy.observation_shape(1), jax.random.key(0)

    def score(params, observation, trace, temperature):
        return policy.log_prob(params, observation, trace, temperature=temperature).logp

    decision = jax.eval_shape(policy.sample, params, observation, key)
    lowered = (
        jit_sample(policy.sample).lower(prepared, observation, key, np.uint32(0), temperature),
        jax.jit(score).lower(params, observation, decision.trace, temperature),
    )
    programs = [one.compile() for one in lowered]
    most = max(program.memory_analysis().temp_size_in_bytes for program in programs)
    return _Programs(*programs, num_bytes((params, made)) + most)


def _in_one_type(model: ModelConfig) -> ModelConfig:
    if isinstance(model, MLPConfig):
        return model
    return dataclasses.replace(model, execution=dataclasses.replace(model.execution, param_dtype=model.execution.dtype))


def draw_params(shapes: PyTree) -> PyTree:
    """Returns random parameters of some shapes and types on the first device, made on the host one leaf at a time.

    The same few million numbers are in all of them, from another place on and in another scale: to draw billions takes
    minutes. Nothing is zero, as biases, gates and adapters are in fresh models, which hides what they multiply.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes)
    block = np.random.default_rng(0).standard_normal(_BLOCK_SIZE, np.float32)
    drawn = {}
    # The largest first: while it is copied there is little else.
    for i in sorted(range(len(leaves)), key=lambda i: -leaves[i][1].size):
        path, leaf = path_name(leaves[i][0]), leaves[i][1]
        mean, deviation = _scale(path, leaf.shape)
        numbers = (mean + deviation * np.roll(block, zlib.crc32(path.encode()) % _BLOCK_SIZE)).astype(leaf.dtype)
        # As plain bits, which NumPy copies as a whole, and numbers of other libraries' types one by one.
        bits = np.resize(numbers.view(f"u{numbers.itemsize}"), leaf.shape)
        drawn[i] = jnp.asarray(bits.view(numbers.dtype))
    return jax.tree.unflatten(tree, [drawn[i] for i in range(len(leaves))])


def _scale(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns mean and deviation of a parameter, with which a product's results are as large as its input."""
    if re.search(r"(scale|ls[12])$", path):
        return float(not path.startswith("PaliGemma/llm/")), _SMALL  # Gemma's are beside one
    if len(shape) < 2 or re.search(r"(bias|token|pos_embed(ding)?)$", path):
        return 0.0, _SMALL
    axes = next((axes for pattern, axes in _INPUT_AXES if re.search(pattern, path)), (-2,))
    return 0.0, math.prod(shape[axis] for axis in axes) ** -0.5


def _draw_observation(policy: Policy) -> Observation:
    """Returns one row of random images, state and tokens."""
    shapes, rng = policy.observation_shape(1), np.random.default_rng(0)
    images = {name: rng.integers(0, 256, x.shape, np.uint8) for name, x in shapes.images.items()}
    tokens = rng.integers(0, _NUM_IDS, shapes.tokens.shape, np.int32)
    state = rng.uniform(-1, 1, shapes.state.shape).astype(np.float32)
    return Observation(images, state, tokens, np.ones(tokens.shape, bool))
