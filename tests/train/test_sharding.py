"""Rules for the whole train state, and a step that does not depend on the mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stare_jax.train.optimizer import OptimizerConfig, make_optimizer
from stare_jax.train.sharding import ShardingError, make_mesh, tree_shardings
from stare_jax.train.state import abstract_state

ROOT = Path(__file__).resolve().parents[2]


def test_moments_lie_where_their_parameter_lies(policy, params):
    tx = make_optimizer(OptimizerConfig(), num_steps=1)
    layout = abstract_state(params, tx, mesh=make_mesh(), rules=policy.sharding_rules)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(layout)
    }
    kernels = [spec for name, spec in specs.items() if name.endswith("logits/kernel")]
    assert kernels == [P("fsdp", None)] * 3 and specs["step"] == P()


def test_every_misfit_between_rules_and_tree_is_named():
    tree = {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "b": {"kernel": jnp.ones((2, 3))},
        "n": jnp.ones(()),
    }
    rules = ((r"a/kernel", P("fsdp")), (r"c/kernel", P()), (r"kernel", P(None, None, "fsdp")), (r"a/", P()))
    with pytest.raises(ShardingError) as error:
        tree_shardings(tree | {"d": {"scale": jnp.ones(1)}}, make_mesh(), rules)
    message = str(error.value)
    assert "no rule matches d/scale" in message
    assert "no parameter is left for the rule(s) 'c/kernel'" in message
    assert "b/kernel: got shape (2, 3)" in message
    assert tree_shardings(tree, make_mesh(), ((r"kernel", P("fsdp")), (r"bias", P())))["b"]["kernel"].spec == P("fsdp")


def test_a_mesh_that_the_machine_cannot_give_is_refused():
    with pytest.raises(ShardingError, match=r"got data x fsdp x tensor = \(1, 64, 1\), expected at most"):
        make_mesh(fsdp=64)
    assert make_mesh(data=-1).shape["data"] == jax.device_count()


def test_eight_devices_step_like_one_and_checkpoints_move_between_meshes(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eight_devices.py")), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["num_devices"] == 8
    # Sums over devices are taken in another order.
    assert report["ppo_difference"] < 1e-5 and report["tpo_difference"] < 1e-5
    assert report["kernel_shard"] == [4, 24] and report["moment_shards"] == [[4, 24], [4, 24]]
    assert report["restored_elsewhere_equal"] and report["restored_shard"] == [8, 24]
    assert report["batch_error"] == "minibatch_size: got 12, expected a multiple of data x fsdp = 8"
