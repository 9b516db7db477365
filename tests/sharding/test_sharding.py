"""Rules for the whole train state, and a step that does not depend on the mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from on_eight_devices import check_full_size, check_models, run_on_eight_devices

from stare_jax.sharding.mesh import ShardingError, make_mesh, tree_shardings
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.state.train_state import abstract_state


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


@pytest.mark.slow
def test_eight_devices_step_like_one_and_checkpoints_move_between_meshes(tmp_path):
    report = run_on_eight_devices("eight_devices.py", str(tmp_path), timeout=300)
    assert report["num_devices"] == 8
    # Sums over devices are taken in another order.
    assert report["ppo_difference"] < 1e-5 and report["tpo_difference"] < 1e-5
    assert report["kernel_shard"] == [4, 24] and report["moment_shards"] == [[4, 24], [4, 24]]
    assert report["restored_elsewhere_equal"] and report["restored_shard"] == [8, 24]
    assert report["batch_error"] == "minibatch_size: got 12, expected a multiple of data x fsdp = 8"
    # Observations that the policy scores and acts on are cut over the devices, whatever their number is.
    assert report["is_scoring_split"] and all(report["is_scoring_split"])
    assert report["is_acting_split"] and all(report["is_acting_split"])
    assert report["score_difference"] < 1e-5 and report["trained_difference"] < 1e-4
    # Each decision finds its own context on its device, whether it is scored again or learnt from.
    assert len(report["kept_log_ratios"]) == 2 and max(report["kept_log_ratios"]) < 1e-4


@pytest.mark.slow
def test_openvla_on_eight_devices_is_that_on_one():
    check_models(run_on_eight_devices("sharded_models.py", "openvla", "few", timeout=600))


@pytest.mark.slow
def test_every_step_of_openvla_on_eight_devices_is_that_on_one():
    check_models(run_on_eight_devices("sharded_models.py", "openvla", timeout=3000))


# An all-gather of one layer's largest kernel, or of the share of it that a tensor axis leaves to a device, is the
# largest thing that is ever exchanged.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["ppo 8 1", "ppo 8 1 full", "tpo 8 1", "sample 8 1", "ppo 4 2", "sample 4 2"])
def test_openvla_7b_gathers_one_layer_at_a_time(case):
    check_full_size(case, largest=4096 * 11008)
