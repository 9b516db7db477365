"""The benchmark of iterations: a small policy acts and learns; a mesh that fails leaves its reason."""

import argparse
import json

import iteration
import numpy as np
import pytest
import stored

from stare_jax.models import openvla_tiny
from stare_jax.models.blank import blank_policy
from stare_jax.runs.config import MeshConfig

CONFIGURATION = """
from configs.presets import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig

def get_config():
    size = {"num_workers": 4, "envs_per_worker": 1, "num_groups": 2, "horizon": 3, "image_size": 0}
    env = EnvConfig("PushCube-v1", use_state="low_dim", **size)
    model = MLPConfig(state_dim=env.state_dim, action_dim=7, hidden_dims=(8,), value_dims=(8,))
    config = base_config(env, model, name="small")
    config.ppo.num_episodes, config.ppo.minibatch_size, config.ppo.microbatch_size = 6, 16, 8
    return config
"""


def test_iterations_are_measured_on_the_meshes_that_there_are(tmp_path, capsys):
    file, out = tmp_path / "small.py", tmp_path / "result.json"
    file.write_text(CONFIGURATION)
    with pytest.raises(SystemExit, match="mesh .*999.*: ShardingError"):
        iteration.main([f"--config={file}", "--meshes=data999,data1", "--repeats=1", f"--out={out}"])
    result = json.loads(out.read_text())
    (row,), (error,) = result["rows"], result["errors"]
    # Six episodes of three actions: 18 decisions, in two minibatches.
    assert (row["rows"], row["num_decisions"], row["num_updates"]) == (2, 18, 2)
    assert sum(row[part] for part in iteration.PARTS) == pytest.approx(row["iteration_s"], rel=0.2)
    assert min(row[part] for part in iteration.PARTS) > 0 and row["act"]["median_s"] > 0 < row["device"]["median_s"]
    assert row["first_log_ratio_rms"] < 1e-5 and set(row["peak_bytes"]) == {"start", "rollout", "update"}
    assert "expected at most 1 device" in error and "data1, peak after update" in capsys.readouterr().out


def test_meshes_are_read():
    sizes = [(mesh.data, mesh.fsdp) for mesh in iteration.parse_meshes("all", 5)]
    assert sizes == [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)]
    with pytest.raises(argparse.ArgumentTypeError, match="got 'tensor2', expected all, or words such as data1"):
        iteration.parse_meshes("tensor2", 5)


def test_stored_observations_have_the_shapes_that_the_policy_takes():
    policy = blank_policy(openvla_tiny(5, camera="eye"))
    env = stored.StoredEnv(policy, 3, horizon=4)
    first = env.reset(range(3)).observation
    shown = first.images["eye"].copy()
    first.images["eye"][:] = 0  # The caller owns it.
    second = env.step(np.zeros((3, 7), np.float32)).observation
    assert (env.horizon, env.action_dim, env.num_envs) == (4, 7, 3)
    assert second.images["eye"].shape == (3, 64, 64, 3) and second.state.shape == (3, 5)
    assert (second.images["eye"][:2] == shown[1:]).all() and not (second.images["eye"] == shown).all()


def test_a_plan_that_fails_says_why(tmp_path):
    failing = iteration.planning([f"--config={tmp_path}/none.py"], MeshConfig(data=1))
    with failing as wait, pytest.raises(RuntimeError, match=r"launch/plan.py ended with \d+: .*none.py"):
        wait()


@pytest.mark.slow
def test_a_plan_foresees_the_peaks_of_either_part(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(CONFIGURATION)
    with iteration.planning([f"--config={file}"], MeshConfig(data=1)) as wait:
        found = wait()
    assert set(found) == {"rollout", "update"} and min(found.values()) > 1000
