"""Gradients of independent batches: what is compared, and with what."""

import gradient_noise
import jax
import numpy as np
import pytest
from gradient_noise import ARMS, batched, first_layer, mean_cosine

from stare_jax.envs import EnvConfig, toy
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.runs.config import RunConfig
from stare_jax.runs.load import LoadedPolicy
from stare_jax.stages import get_task


def test_cosines_are_those_of_even_with_odd_batches():
    a, b, c = ({"trunk_0/kernel": np.array([[x]]), "trunk_1/bias": np.array([y])} for x, y in ((3, 4), (0, 5), (3, -4)))
    assert mean_cosine([a, b, c, b], "") == pytest.approx((0.8 - 0.8) / 2)
    assert mean_cosine([a, c], "trunk_0") == 1.0
    assert mean_cosine([a, c], "trunk_1") == -1.0
    assert first_layer(a) == "trunk_0"
    assert [len(rows) for rows in batched(np.arange(10), 4)] == [4, 4, 2]


@pytest.mark.slow
def test_a_policy_has_a_row_for_every_arm_and_lambda():
    model = MLPConfig(hidden_dims=(8,), value_dims=(8,))
    policy, spec = make_mlp(model, toy.norm_stats()), get_task("PushCube-v1")
    params = policy.init(jax.random.key(0))
    config = RunConfig(EnvConfig("PushCube-v1", horizon=toy.HORIZON, image_size=0), model, spec.params)
    act = policy_act(policy, params, jax.random.key(1))
    rollout = collect_episodes(toy.ToyPush(16), act, np.arange(64), stop_at_success=True)
    rows = gradient_noise.measure(LoadedPolicy(config, policy, params), rollout, (0.8,), size=8)
    assert [(row["arm"], row["lambda"]) for row in rows] == [(arm, 0.8) for arm in ARMS]
    for row in rows:
        assert row["batches"] == 4 and set(row["cosine"]) == {"logits", ""}
        assert all(-1 <= cosine <= 1 for cosine in row["cosine"].values())
