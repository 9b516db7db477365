"""Observations are put where the policy acts, whatever they come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stare_jax.data.pairs import PairsConfig
from stare_jax.data.rollouts import policy_actor
from stare_jax.evaluate.protocol import policy_act_of
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.models.nn.layout import store_as
from stare_jax.models.normalize import identity_stats
from stare_jax.rollout import prepared
from stare_jax.rollout.acting import acting_sharding, place_rows, policy_act
from stare_jax.sharding.mesh import batch_sharding, make_mesh
from stare_jax.types import Observation

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def report():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, str(HERE / "acting.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_device_decides_for_its_share_of_the_rows(report):
    assert report["num_devices"] == 8
    # 16 rows, and 12 rows that are filled up to 16, are two on each of eight devices.
    assert report["seen"] == [[2, 16, False]]


def test_the_action_is_where_the_simulator_is(report):
    assert report["action_devices"] == [[3], [3]] and report["given_mesh"] == [[3]]


def test_collection_evaluation_and_pairs_run_on_a_mesh(report):
    assert max(report["rollouts"]) < 1e-5
    assert report["evaluations_equal"] and report["pairs"]


def test_parameters_say_where_a_policy_acts():
    mesh = make_mesh()
    rows = np.arange(3.0)
    assert acting_sharding({"w": np.ones(2)}) is None and place_rows(rows, None) is rows
    on_device = jax.device_put(np.ones(2), jax.devices()[0])
    assert place_rows(rows, acting_sharding({"w": on_device})).devices() == {jax.devices()[0]}
    on_mesh = jax.device_put(np.ones(2), batch_sharding(mesh))
    assert acting_sharding({"v": np.ones(2), "w": on_mesh}) == batch_sharding(mesh)


def test_a_policy_is_compiled_once_and_that_is_said(capsys):
    policy = make_mlp(MLPConfig(hidden_dims=(4,), value_dims=(4,)), identity_stats(2, 6))
    params = jax.jit(policy.init)(jax.random.key(0))
    observation = Observation({}, np.zeros((1, 6), np.float32), np.zeros((1, 0), np.int32), np.zeros((1, 0), bool))
    for key in (1, 2):
        policy_act(policy, params, jax.random.key(key))(observation, None, ("",), np.ones(1, bool))
    assert capsys.readouterr().err == "compiling the policy that acts (done once; a minute for large models)\n"


def test_parameters_are_prepared_once_for_all_parts_of_an_evaluation_and_all_pairs(monkeypatch):
    calls, jit_changes = [], prepared.jit_changes
    monkeypatch.setattr(prepared, "jit_changes", lambda prepare: calls.append(prepare) or jit_changes(prepare))
    policy = make_mlp(MLPConfig(hidden_dims=(4,), value_dims=(4,)), identity_stats(2, 6))
    policy = policy._replace(prepare=lambda params: store_as(params, ("kernel",), "bfloat16"))
    params = jax.jit(policy.init)(jax.random.key(0))
    act_of = policy_act_of(policy, params, jax.random.key(0), temperature=0.0)
    actor = policy_actor(lambda: (policy, params), PairsConfig(), source="")
    assert all(callable(act) for act in (act_of(0), act_of(1), actor.act([0, 1]), actor.act([2, 3])))
    assert calls == [policy.prepare] * 2
