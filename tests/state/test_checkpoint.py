"""What is saved comes back; what does not fit says where; what was half written is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs import toy
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state import checkpoint
from stare_jax.state.checkpoint import CheckpointError, Checkpoints
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.state.train_state import abstract_state, create_state

FREEZE = ("^trunk",)
MODEL = {"kind": "mlp", "hidden_dims": [16]}
TX = make_optimizer(OptimizerConfig(), num_steps=1)


@pytest.fixture(scope="module")
def state(policy, params):
    return create_state(params, TX, mesh=make_mesh(), rules=policy.sharding_rules, freeze=FREEZE)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A directory with the steps 1 .. 3, of which 2 and 3 are kept."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2, 3):
            trainable = jax.tree.map(lambda x, s=step: x + s, state.trainable)
            moved = state.replace(step=jnp.int32(10 * step), trainable=trainable)
            counters = {"iteration": step, "rate": 0.5}
            checkpoints.save(step, moved, norm_stats=toy.norm_stats(), model=MODEL, counters=counters)
    return directory


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_everything_comes_back_onto_shapes_alone(saved, state, policy, params):
    layout = abstract_state(params, TX, mesh=make_mesh(), rules=policy.sharding_rules, freeze=FREEZE)
    got, counters = checkpoint.restore(saved, layout)
    assert_equal(got, state.replace(step=jnp.int32(30), trainable=jax.tree.map(lambda x: x + 3, state.trainable)))
    assert counters == {"iteration": 3, "rate": 0.5}


def test_parameters_statistics_and_counters_can_be_loaded_alone_and_of_an_earlier_step(saved, state):
    assert checkpoint.complete_steps(saved) == [2, 3]
    trainable = jax.tree.map(lambda x: x + 2, state.trainable)
    expected = state.replace(trainable=trainable).params
    assert_equal(checkpoint.load_params(saved, state.params, step=2), expected)
    assert checkpoint.load_model(saved) == MODEL
    assert_equal(checkpoint.load_norm_stats(saved), toy.norm_stats())
    assert checkpoint.load_counters(saved, step=2)["iteration"] == 2


def test_saving_copies_before_it_returns(state, tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    donated, expected = jax.tree.map(jnp.copy, state), []
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in range(3):
            expected.append(jax.tree.map(lambda x: np.array(x, copy=True), donated))
            checkpoints.save(step, donated, norm_stats=toy.norm_stats(), model={}, counters={})
            donated = add(donated.replace(frozen=None)).replace(frozen=state.frozen)
    for step in range(3):
        assert_equal(checkpoint.restore(tmp_path, state, step=step).state, expected[step])


def test_a_checkpoint_that_does_not_fit_names_every_path(saved, state):
    like = dict(state.params)
    like["logits"] = {"kernel": jnp.zeros((16, 25)), "bias": state.params["logits"]["bias"].astype(jnp.bfloat16)}
    like["adapter"] = {"kernel": jnp.zeros(3)}
    del like["trunk_0"]
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_params(saved, like)
    message = str(error.value)
    for line in (
        "params/adapter/kernel: not in the checkpoint",
        "params/trunk_0/bias: only in the checkpoint",
        "params/logits/kernel: got float32[16, 24], expected float32[16, 25]",
        "params/logits/bias: got float32[24], expected bfloat16[24]",
    ):
        assert line in message


def test_a_checkpoint_that_is_not_there_says_what_is(saved, state, tmp_path):
    with pytest.raises(CheckpointError, match=r"got complete checkpoints of the steps \[2, 3\], expected step 1"):
        checkpoint.load_params(saved, state.params, step=1)
    with pytest.raises(CheckpointError, match=r"steps \[\], expected any checkpoint"):
        checkpoint.restore(tmp_path / "nothing", state)


def test_what_a_kill_left_behind_is_ignored_and_cleaned_up(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, norm_stats=toy.norm_stats(), model={}, counters={"iteration": 4})
    # Orbax writes under another name and renames at the end; what it began to delete has no metadata.
    (tmp_path / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "6" / "params").mkdir(parents=True)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": null}')
    assert checkpoint.complete_steps(tmp_path) == [4]
    assert checkpoint.restore(tmp_path, state).counters == {"iteration": 4}
    with Checkpoints(tmp_path) as checkpoints:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "frozen"]
        for step in (5, 6):
            checkpoints.save(step, state, norm_stats=toy.norm_stats(), model={}, counters={"iteration": step})
    assert checkpoint.complete_steps(tmp_path) == [5, 6]
    assert checkpoint.restore(tmp_path, state).counters == {"iteration": 6}
