"""Kinds of files that take seconds to set up: checkpoints of a phase, and data sets of tensorflow-datasets."""

import functools
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from trials import Kind, either, missing, text

from stare_jax.envs import toy
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state import checkpoint
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.state.train_state import create_state


@functools.cache
def _state():
    policy = make_mlp(MLPConfig(hidden_dims=(4,), value_dims=(4,)), toy.norm_stats())
    params = jax.jit(policy.init)(jax.random.key(0))
    transformation = make_optimizer(OptimizerConfig(), num_steps=1)
    return create_state(params, transformation, mesh=make_mesh(), rules=policy.sharding_rules, freeze=("^trunk",))


def write_checkpoints(folder):
    """Writes two steps, and the parameters that are not trained."""
    model = {"kind": "mlp", "hidden_dims": [4]}
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            state = _state().replace(step=jnp.int32(10 * step))
            checkpoints.save(step, state, norm_stats=toy.norm_stats(), model=model, counters={"iteration": step})


def read_checkpoint(folder):
    """Opens the folder to go on writing, and reads the newest step in every way in which it is read."""
    with Checkpoints(folder):
        pass
    restored = checkpoint.restore(folder, _state())
    params = checkpoint.load_params(folder, _state().params)
    leaves = jax.tree.leaves((restored.state, params))
    return leaves, restored.counters, checkpoint.load_norm_stats(folder), checkpoint.load_model(folder)


CHECKPOINTS = Kind("checkpoints", write_checkpoints, read_checkpoint, "*", may_miss=("checksums.json",))


def write_rlds(folder):
    """Writes a small Bridge V2 and leaves one split of it."""
    import rlds_builder

    with tempfile.TemporaryDirectory() as elsewhere:
        shutil.copytree(rlds_builder.build(Path(elsewhere)), folder / rlds_builder.NAME / rlds_builder.VERSION)


def read_rlds(folder):
    from stare_jax.data.rlds_layouts import LAYOUTS
    from stare_jax.data.rlds_source import check_source, open_source, read_episodes
    from stare_jax.data.schema import DatasetError

    source, layout = open_source(next(folder.glob("*/*"))), LAYOUTS["bridge_orig"]
    check_source(source, layout, "train")
    episodes = []
    for episode in read_episodes(source, layout, "train", 0, source.num_episodes["train"], image_size=8):
        if isinstance(episode, DatasetError):  # as an import does that leaves out nothing
            raise episode
        episodes.append(episode)
    return episodes


RLDS = Kind(
    "RLDS",
    write_rlds,
    read_rlds,
    "*",
    rules={
        r"splits\[\d\]\.(shardLengths.*|name)": text,  # the file alone says how many episodes there are
        r"(name|version|fileFormat)": either(text, missing),
    },
)
