"""What a whole run refuses before it begins."""

import dataclasses

import pytest

from stare_jax.data.demos import DemosConfig
from stare_jax.data.pairs import PairsConfig
from stare_jax.data.schema import DatasetError, Manifest, write_manifest
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny
from stare_jax.stages import get_task
from stare_jax.train.config import ConfigError
from stare_jax.train.ipi import IPIConfig, check_demonstrations, run_ipi

SHAPES = {"image/base_camera": [64, 64, 3], "state": [0], "action": [7], "tokens": [0], "action_tokens": [7]}


@pytest.fixture
def given(tmp_path):
    """given(**fields of the manifest) -> a configuration with such a data set of demonstrations."""

    def make(shapes=SHAPES, env=None, **fields):
        fields = {"env_id": "PushCube-v1", "control_mode": "pd_ee_delta_pose"} | fields
        empty = {"settings": {}, "filters": {}, "packages": {}, "progress": {}, "shards": (), "episodes": ()}
        write_manifest(tmp_path / "demos", Manifest(shapes=shapes, **empty, **fields))
        env = env or EnvConfig()
        return IPIConfig(env, openvla_tiny(), get_task(env.env_id).params, demos_from=str(tmp_path / "demos"))

    return make


def test_demonstrations_that_fit_are_taken(given):
    check_demonstrations(given())
    widow_x = EnvConfig("PutSpoonOnTableClothInScene-v1")
    check_demonstrations(given(env=widow_x, env_id=widow_x.env_id, control_mode=widow_x.resolved_control_mode))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env_id": "PullCube-v1"}, "env_id: got 'PullCube-v1', expected 'PushCube-v1'"),
        ({"control_mode": "pd_ee_delta_pos"}, "control_mode: got 'pd_ee_delta_pos', expected 'pd_ee_delta_pose'"),
        (
            {"shapes": SHAPES | {"image/base_camera": [32, 32, 3]}},
            "image/base_camera: got [32, 32, 3], expected [64, 64, 3]",
        ),
        (
            {"shapes": SHAPES | {"state": [3], "action": [4]}},
            "state: got [3], expected [0]; action: got [4], expected [7]",
        ),
        ({"shapes": {}}, "image/base_camera: got None, expected [64, 64, 3]"),
    ],
)
def test_demonstrations_of_something_else_are_refused_before_the_run_begins(given, tmp_path, fields, message):
    config = given(**fields)
    with pytest.raises(ConfigError) as refused:
        run_ipi(config, tmp_path / "run")
    assert str(refused.value).startswith(f"config.demos_from: {config.demos_from} is not for this run: ")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["demos", "pairs"])
def test_a_gpu_promises_no_reproducible_resets(name):
    env = EnvConfig(backend="cuda", num_workers=1)
    configs = {"demos": DemosConfig(reproducible=True), "pairs": PairsConfig(reproducible=True)}
    with pytest.raises(ValueError, match=f"{name}.reproducible: got True, expected False with env.backend 'cuda'"):
        IPIConfig(env, openvla_tiny(), get_task(env.env_id).params, **{name: configs[name]})
    assert IPIConfig(env, openvla_tiny(), get_task(env.env_id).params).env.data_settings["backend"] == "cuda"


def test_demonstrations_that_are_not_there_are_refused(given, tmp_path):
    with pytest.raises(DatasetError, match="nowhere is not a data set"):
        run_ipi(dataclasses.replace(given(), demos_from=str(tmp_path / "nowhere")), tmp_path / "run")
