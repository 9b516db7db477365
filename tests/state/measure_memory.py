"""Run by test_checkpoint.py: prints by how many bytes the memory for writing or reading a model exceeds the model."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stare_jax.envs import toy
from stare_jax.logging import PeakMemory
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state import checkpoint
from stare_jax.state.storage import num_bytes
from stare_jax.state.train_state import TrainState

SIZES = [256, 256, 256, 256, 256, 128, 64, 32]
"""MiB of each frozen leaf."""


def make_state(leaf):
    frozen = {f"leaf_{number}": leaf(size) for number, size in enumerate(SIZES)}
    return TrainState(leaf(0), {"adapter": leaf(1)}, frozen, {"moment": leaf(1)})


def random_leaf(size):
    """Numbers that cannot be compressed; a scalar for 0."""
    shape = (size, 2**18) if size else ()
    return jnp.asarray(np.random.default_rng(size).random(shape, np.float32))


def abstract_leaf(size):
    sharding = NamedSharding(make_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct((size, 2**18) if size else (), jnp.float32, sharding=sharding)


def run(task, directory):
    if task == "write":
        state = jax.block_until_ready(make_state(random_leaf))
        with PeakMemory() as memory, checkpoint.Checkpoints(directory) as checkpoints:
            checkpoints.save(1, state, norm_stats=toy.norm_stats(), model={}, counters={})
        return memory.peak - memory.start
    like = make_state(abstract_leaf)
    with PeakMemory() as memory:
        if task == "read":
            loaded = jax.block_until_ready(checkpoint.load_params(directory, like.params))
        else:
            loaded = jax.block_until_ready(checkpoint.restore(directory, like).state)
    return memory.peak - memory.start - num_bytes(loaded)


if __name__ == "__main__":
    print(run(*sys.argv[1:]))
