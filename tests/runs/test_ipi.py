"""Refusals of a whole run before it begins."""

import dataclasses
import re

import pytest

from stare_jax.config import ConfigError
from stare_jax.data.demos import DemosConfig
from stare_jax.data.pairs import PairsConfig
from stare_jax.data.schema import DatasetError, Episode, Manifest, Shard, ShardFile, write_manifest
from stare_jax.envs import EnvConfig
from stare_jax.evaluate.protocol import EvalConfig
from stare_jax.models import openvla_tiny
from stare_jax.runs.config import RunConfig
from stare_jax.runs.ipi import run_ipi
from stare_jax.runs.start import check_demonstrations
from stare_jax.stages import get_task

EPISODES = (Episode(7, "push the blue cube to the target", "expert", 0.0, True, 5),)
SHARDS = (Shard(ShardFile("frames", 6, 0, "0" * 64), ShardFile("episodes", 1, 0, "0" * 64)),)
SHAPES = {"image/base_camera": [64, 64, 3], "state": [0], "action": [7], "tokens": [0]}


@pytest.fixture
def given(tmp_path):
    """given(**fields of the manifest) -> a configuration with such a data set of demonstrations; `run` has other fields
    of the configuration."""

    def make(shapes=SHAPES, env=None, model=None, run=None, **fields):
        fields = {"env_id": "PushCube-v1", "control_mode": "pd_ee_delta_pose"} | fields
        empty = {"settings": {}, "filters": {}, "packages": {}, "progress": {}, "shards": SHARDS, "episodes": EPISODES}
        write_manifest(tmp_path / "demos", Manifest(shapes=shapes, **empty, **fields))
        env, run = env or EnvConfig(), {"demos_from": str(tmp_path / "demos")} | (run or {})
        return RunConfig(env, model or openvla_tiny(), get_task(env.env_id).params, **run)

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
            {"shapes": SHAPES | {"state": [3], "action": [4]}, "model": openvla_tiny(state_dim=29)},
            "action: got [4], expected [7]; state: got [3], expected [29]",
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
        RunConfig(env, openvla_tiny(), get_task(env.env_id).params, **{name: configs[name]})
    assert RunConfig(env, openvla_tiny(), get_task(env.env_id).params).env.data_settings["backend"] == "cuda"


REAL = {"env_id": "bridge_orig", "control_mode": "reached ee delta pose", "shapes": SHAPES | {"state": [7]}}
SFT_ALONE = {"demos_of": "bridge_orig", "phases": ("sft",), "evaluation": EvalConfig(num_episodes=0)}


def test_demonstrations_of_a_real_robot_are_taken_where_they_are_asked_for(given):
    check_demonstrations(given(**REAL, run=SFT_ALONE))
    widow_x = EnvConfig("PutSpoonOnTableClothInScene-v1", gripper_threshold=0.5)
    check_demonstrations(given(**REAL, env=widow_x, run={"demos_of": "bridge_orig"}))
    for run, message in [
        ({}, "env_id: got 'bridge_orig', expected 'PushCube-v1'; control_mode: got 'reached"),
        (SFT_ALONE | {"demos_of": "fractal"}, "env_id: got 'bridge_orig', expected 'fractal'$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_demonstrations(given(**REAL, run=run))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (EnvConfig(), "env.env_id: got 'PushCube-v1' with demos_of, expected a WidowX task, or phases ('sft',) and"),
        (
            EnvConfig("PutSpoonOnTableClothInScene-v1"),
            "env.gripper_threshold: got None with demos_of, expected 0.5, or",
        ),
    ],
)
@pytest.mark.parametrize("part", [{"evaluation": EvalConfig(num_episodes=1)}, {"phases": ("sft", "ppo")}])
def test_a_simulator_has_to_take_what_a_real_robot_teaches(given, env, message, part):
    with pytest.raises(ValueError, match=re.escape(message)):
        given(**REAL, env=env, run=SFT_ALONE | part)


def test_a_real_robots_demonstrations_are_in_a_folder(given, tmp_path):
    with pytest.raises(
        ConfigError, match="config.demos_from: got '', expected the folder that bridge_orig was imported"
    ):
        run_ipi(given(**REAL, run=SFT_ALONE | {"demos_from": ""}), tmp_path / "run")


def test_demonstrations_that_are_not_there_are_refused(given, tmp_path):
    with pytest.raises(DatasetError, match="nowhere is not a data set"):
        run_ipi(dataclasses.replace(given(), demos_from=str(tmp_path / "nowhere")), tmp_path / "run")
