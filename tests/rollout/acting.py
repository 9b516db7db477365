"""Acting on eight fake devices; run by the test beside it in a process of its own, prints one line of JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.data.pairs import PairsConfig
from stare_jax.data.rollouts import policy_actor
from stare_jax.envs import toy
from stare_jax.evaluate.protocol import EvalConfig, evaluate
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.sharding.mesh import make_mesh, tree_shardings
from stare_jax.types import Observation

POLICY = make_mlp(MLPConfig(hidden_dims=(16,), value_dims=(16,)), toy.norm_stats())
PARAMS = jax.device_get(jax.jit(POLICY.init)(jax.random.key(0)))
EIGHT = make_mesh(data=2, fsdp=4)
SHARDED = jax.device_put(PARAMS, tree_shardings(PARAMS, EIGHT, POLICY.sharding_rules))
seen = []
"""Rows of a device, of all devices, and whether every device has all rows, each time `sample` is compiled."""


def watched_sample(params, observation, key, *, temperature):
    def note(sharding):
        rows = len(observation.state)
        seen.append((sharding.shard_shape(observation.state.shape)[0], rows, sharding.is_fully_replicated))

    jax.debug.inspect_array_sharding(observation.state, callback=note)
    return POLICY.sample(params, observation, key, temperature=temperature)


WATCHED = POLICY._replace(sample=watched_sample)


def observe(size, device=None):
    state = np.random.default_rng(0).uniform(-0.2, 0.2, (size, 6)).astype(np.float32)
    no_tokens = np.zeros((size, 0), np.int32)
    state = state if device is None else jax.device_put(state, device)
    return Observation({}, state, no_tokens, no_tokens.astype(bool))


def decide(policy, params, observation, **options):
    size = len(observation.state)
    act = policy_act(policy, params, jax.random.key(1), temperature=0.0, **options)
    return act(observation, None, ["push"] * size, np.ones(size, bool))[0]


def is_same(size, **options):
    """Returns whether eight devices decide as one does, from NumPy arrays and from arrays committed to one of them."""
    expected = jax.device_get(decide(POLICY, PARAMS, observe(size)))
    found = [decide(WATCHED, SHARDED, observe(size, device), **options) for device in (None, jax.devices()[3])]
    for decision in jax.device_get(found):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), decision, expected)
    return [sorted(device.id for device in found[1].action.devices())]


class ToyOnDevice(toy.ToyPush):
    """Its states are committed to one of eight devices, as those of a simulator on a GPU are."""

    def _put(self, state):
        device = jax.devices()[3]
        observation = state.observation._replace(state=jax.device_put(state.observation.state, device))
        return state._replace(observation=observation, signals=jax.device_put(state.signals, device))

    def reset(self, seeds, *, reproducible=False):
        return self._put(super().reset(seeds, reproducible=reproducible))

    def send(self, action, reset_seeds=None, **options):
        assert isinstance(action, jax.Array) and action.devices() == {jax.devices()[3]}
        super().send(np.asarray(action), reset_seeds, **options)

    def receive(self):
        return self._put(super().receive())


def roll(policy, params, env_class):
    act = policy_act(policy, params, jax.random.key(2), temperature=0.0)
    return collect_episodes(env_class(12), act, np.arange(15), stop_at_success=True).trajectory.action


def judge(params):
    evaluation, _ = evaluate(POLICY, params, toy.ToyPush(12), toy.task_spec(), EvalConfig(num_episodes=15))
    return np.asarray(evaluation.episodes.stage_reached)


def pair_actor_acts():
    act = policy_actor(lambda: (WATCHED, SHARDED), PairsConfig(), source="sft").act([0, 1])
    return bool(np.isfinite(act(observe(8), None, ["push"] * 8, np.ones(8, bool))[0].action).all())


assert jnp.zeros(1).devices() == {jax.devices()[0]}
report = {"num_devices": jax.device_count(), "action_devices": is_same(16) + is_same(12)}
report["given_mesh"] = is_same(16, mesh=EIGHT)
report["seen"] = sorted(set(seen))
rollouts = [roll(POLICY, PARAMS, toy.ToyPush), roll(WATCHED, SHARDED, toy.ToyPush), roll(WATCHED, SHARDED, ToyOnDevice)]
report["rollouts"] = [float(np.abs(rollout - rollouts[0]).max()) for rollout in rollouts]
report["evaluations_equal"] = bool((judge(PARAMS) == judge(SHARDED)).all())
report["pairs"] = pair_actor_acts()
print(json.dumps(report))
