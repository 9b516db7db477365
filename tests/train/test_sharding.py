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


def run_on_eight_devices(script, *arguments, timeout):
    """Runs a file of this folder in a process with eight fake devices and returns what it prints last."""
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests / "models"), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, str(tests / "train" / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_models(report):
    assert report["exchanged_by_sampling"] == []
    for found in report["steps"]:
        # Sums over devices are taken in another order.
        assert found["difference"] < 1e-5 < 1e-3 < found["change"], found
        assert found["misplaced"] == [] and found["exchanged"] == [], found
    for found in report["actions"]:
        assert found["tokens_0"] and found["tokens_1"], found
        assert found["difference_0"] < 1e-4 and found["difference_1"] < 1e-4, found


def test_eight_devices_step_like_one_and_checkpoints_move_between_meshes(tmp_path):
    report = run_on_eight_devices("eight_devices.py", str(tmp_path), timeout=300)
    assert report["num_devices"] == 8
    # Sums over devices are taken in another order.
    assert report["ppo_difference"] < 1e-5 and report["tpo_difference"] < 1e-5
    assert report["kernel_shard"] == [4, 24] and report["moment_shards"] == [[4, 24], [4, 24]]
    assert report["restored_elsewhere_equal"] and report["restored_shard"] == [8, 24]
    assert report["batch_error"] == "minibatch_size: got 12, expected a multiple of data x fsdp = 8"


@pytest.mark.parametrize("model", ["openvla", "pi05"])
def test_steps_and_actions_on_eight_devices_are_those_on_one(model):
    check_models(run_on_eight_devices("sharded_models.py", model, "few", timeout=600))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["openvla", "pi05"])
def test_every_step_on_eight_devices_is_that_on_one(model):
    check_models(run_on_eight_devices("sharded_models.py", model, timeout=3000))


def check_full_size(case, largest):
    tensor = int(case.split()[2])
    found = run_on_eight_devices("compile_full_size.py", *case.split(), timeout=1200)
    assert found["moved_out"] == [] and found["largest"] <= largest // tensor, found["largest_is"]
    if tensor == 1:
        assert found["not_zero3"] == []
    # What a device holds is its share, up to a few scalars, and what a step changes is changed in place.
    assert abs(found["argument_bytes"] - found["expected_bytes"]) < 2**10
    assert found["reused_bytes"] == found["moving_bytes"]


# An all-gather of one layer's largest kernel, or of the share of it that a tensor axis leaves to a device, is the
# largest thing that is ever exchanged.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["ppo 8 1", "ppo 8 1 full", "tpo 8 1", "sample 8 1", "ppo 4 2", "sample 4 2"])
def test_openvla_7b_gathers_one_layer_at_a_time(case):
    check_full_size(case, largest=4096 * 11008)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ppo 8 1 pi05", "sft 8 1 pi05 full", "sample 8 1 pi05"])
def test_pi05_gathers_one_layer_at_a_time(case):
    check_full_size(case, largest=2 * 2048 * 16384)
