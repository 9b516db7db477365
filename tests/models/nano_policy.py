"""A policy small enough to compile in seconds, with random numbers in every leaf."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.models import make_policy, openvla_tiny, with_prompt
from stare_jax.models.nn.linear import Execution
from stare_jax.models.nn.llama import LlamaConfig
from stare_jax.models.nn.vit import ViTConfig
from stare_jax.models.policy import Policy
from stare_jax.types import NormStats, Observation

# Tests compile much and run little: half the compile time for slower programs.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def nano_config(**changes):
    """The tiny preset with two layers everywhere and grouped heads, scanned instead of unrolled."""
    tower = ViTConfig(width=16, depth=3, num_heads=2, mlp_dim=32, patch_size=4)
    config = openvla_tiny(
        state_dim=2,
        dino=dataclasses.replace(tower, num_prefix=3, layer_scale=1.0),
        siglip=tower,
        projector_dim=32,
        llm=LlamaConfig(vocab_size=960, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48),
        action_vocab_end=896,
        image_size=32,
        stem=(8,),
        action_dim=3,
        value_dims=(16, 8),
        execution=Execution(),
        decode_unroll=1,
    )
    return dataclasses.replace(config, **changes)


def some_stats(action_dim, state_dim):
    """Statistics that change something, with the last action passed through and the first state constant."""
    return NormStats(
        action_q01=np.linspace(-0.5, -0.1, action_dim, dtype=np.float32),
        action_q99=np.linspace(0.2, 0.9, action_dim, dtype=np.float32),
        action_mask=np.arange(action_dim) < action_dim - 1,
        state_q01=np.zeros(state_dim, np.float32),
        state_q99=np.minimum(np.arange(state_dim, dtype=np.float32), 1.0),
    )


def random_params(policy, seed=0):
    """Fills every leaf with normal numbers: no zero or one of an initialiser hides a mistake."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(s.dtype), shapes)


def random_observation(policy, instructions, seed=0):
    """A batch of random images and states with these instructions."""
    rng = np.random.default_rng(seed)
    shape = policy.observation_shape(len(instructions))
    images = {name: rng.integers(0, 256, s.shape).astype(np.uint8) for name, s in shape.images.items()}
    state = rng.uniform(-1, 1, shape.state.shape).astype(np.float32)
    blank = np.zeros((len(instructions), 0))
    observation = Observation(images, state, blank.astype(np.int32), blank.astype(bool))
    return with_prompt(policy, observation, instructions)


class Case(NamedTuple):
    """A policy with everything needed to call it; the functions are jitted once for all tests."""

    policy: Policy
    params: Any
    observation: Observation
    sample: Any
    log_prob: Any
    loss_and_grad: Any


def make_case(config, instructions, seed=0):
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))

    def loss(params, observation, action):
        loss, metrics = policy.imitation_loss(params, observation, action)
        return loss.mean(), (loss, metrics)

    return Case(
        policy,
        random_params(policy, seed),
        random_observation(policy, instructions, seed),
        jit(policy.sample),
        jit(policy.log_prob),
        jit(jax.value_and_grad(loss, has_aux=True)),
    )


INSTRUCTIONS = ("push the blue cube to the target", "lift the peg upright", "Push the blue cube to the target ")
