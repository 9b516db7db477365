"""Data and a metrics writer for the tests of the training loops on the toy task."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.data.windows import window_indices
from stare_jax.envs import toy
from stare_jax.models.policy import Decision
from stare_jax.rollout.acting import policy_act
from stare_jax.rollout.collect import collect_episodes
from stare_jax.types import PreferencePair


def fresh(params):
    """A copy of parameters that a phase may consume."""
    return jax.tree.map(jnp.copy, params)


class Writer:
    """Keeps metrics in a list."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []

    def __call__(self, step, metrics, *, phase):
        self.lines.append({"step": step, "phase": phase, **metrics})

    def column(self, name):
        return [line[name] for line in self.lines]


NUM_ENVS = 16
"""The same everywhere, so that simulator and policy are compiled once."""


def expert_act(observation, signals, instructions, is_first):
    """The toy's expert as an `Act`."""
    return Decision(toy.expert_action(signals)), observation


def expert_episodes(num_episodes, *, seed=0, noise=0.5):
    """Episodes of the expert, which is disturbed by noise."""
    rng = np.random.default_rng(seed)

    def perturb(action, is_first):
        return np.clip(action + rng.normal(0, noise, action.shape), -1, 1)

    seeds = 1000 + np.arange(num_episodes)
    env = toy.ToyPush(NUM_ENVS)
    return collect_episodes(env, expert_act, seeds, stop_at_success=True, perturb=perturb).trajectory


def demonstrations(num_episodes, *, seed=0, noise=0.5):
    """Observations and actions of expert episodes, flattened over their valid steps."""
    trajectory = expert_episodes(num_episodes, seed=seed, noise=noise)
    at = np.nonzero(trajectory.valid[:, 1:])
    return jax.tree.map(lambda x: x[at], trajectory.observation), trajectory.action[at]


def demo_windows(num_episodes, *, window, seed=0):
    """The same for policies that predict several actions: observations, windows of actions, what is inside."""
    trajectory = expert_episodes(num_episodes, seed=seed)
    valid = trajectory.valid[:, 1:]
    episode, t = np.nonzero(valid)
    index, is_inside = window_indices(t, valid.sum(axis=1)[episode], window)
    return (
        jax.tree.map(lambda x: x[episode, t], trajectory.observation),
        trajectory.action[episode[:, None], index],
        is_inside,
    )


def demo_batches(observation, action, valid=None, *, size, seed=0):
    """batches(start_step) for `train_sft`: batch s is a function of s alone."""

    valid = np.ones(len(action), bool) if valid is None else valid

    def batches(start_step):
        step = start_step
        while True:
            rows = np.random.default_rng((seed, step)).integers(0, len(action), size)
            yield jax.tree.map(lambda x, rows=rows: x[rows], observation), action[rows], valid[rows]
            step += 1

    return batches


def random_pairs(policy, params, num_pairs):
    """Pairs of rollouts of a policy, in no order of merit."""
    act = policy_act(policy, params, jax.random.key(1))
    rollout = collect_episodes(toy.ToyPush(NUM_ENVS), act, np.arange(2 * num_pairs), stop_at_success=True)
    chosen, rejected = (jax.tree.map(lambda x, s=s: x[s::2], rollout.trajectory) for s in (0, 1))
    return PreferencePair(chosen, rejected)


def with_contexts(policy):
    """The policy, which acts and scores decisions by contexts alone: the states that they were made in."""

    def log_prob(params, observation, trace, *, context=None, **settings):
        seen = observation if context is None else observation._replace(state=context)
        return policy.log_prob(params, seen, trace, **settings)

    def sample(params, observation, key, *, context=None, **settings):
        seen = observation if context is None else observation._replace(state=context)
        return policy.sample(params, seen, key, **settings)

    def encode(params, observation):
        return jnp.asarray(observation.state)

    return policy._replace(sample=sample, log_prob=log_prob, encode=encode)
