"""Whole runs on the toy: its plane dressed up as PushCube with seven numbers of action, and a small policy."""

import dataclasses

import numpy as np

from stare_jax.data.demos import DemosConfig
from stare_jax.data.pairs import PairsConfig
from stare_jax.envs import EnvConfig, Expert, toy
from stare_jax.evaluate.protocol import EvalConfig
from stare_jax.models import MLPConfig, make_mlp, openvla_state
from stare_jax.runs import ipi, load, plan
from stare_jax.runs.config import RunConfig
from stare_jax.stages import get_task
from stare_jax.train.ppo import PPOConfig
from stare_jax.train.sft import SFTConfig
from stare_jax.train.tpo import TPOConfig

NUM_ENVS = 4


class DressedToy(toy.ToyPush):
    """Counts how often simulators were started."""

    env_id = "PushCube-v1"
    action_dim = 7
    num_started = 0

    def __init__(self, num_envs):
        super().__init__(num_envs)
        DressedToy.num_started += 1

    def send(self, action, reset_seeds=None, **options):
        super().send(np.asarray(action)[:, :2], reset_seeds, **options)

    def close(self):
        pass


def _act(signals, memory):
    action = np.zeros(7, np.float32)
    action[:2] = toy.expert_action(type(signals)(*(leaf[None] for leaf in signals)))[0]
    return action, memory


prompt_lengths = []
"""of the configurations that policies were made of"""


def make_policy(config, norm_stats):
    """A network of a few hundred parameters, whatever the configuration asks for: compiling is what takes time."""
    prompt_lengths.append(config.prompt_length)
    return make_mlp(MLPConfig(action_dim=7, hidden_dims=(8,), value_dims=(8,), label_width=0.5), norm_stats)


def make_config(**changes):
    """A run of all phases, of a few optimiser steps each."""
    env = EnvConfig("PushCube-v1", num_workers=1, envs_per_worker=NUM_ENVS, horizon=toy.HORIZON, image_size=0)
    model = openvla_state(toy.STATE_DIM, prompt_length=64)
    config = RunConfig(
        env,
        model,
        get_task("PushCube-v1").params,
        demos=DemosConfig(num_demos=4, noise_scales=((0.3, 1.0),)),
        sft=SFTConfig(num_steps=4, batch_size=4, log_every=1, checkpoint_every=2),
        pairs=PairsConfig(num_pairs=2, rollouts_per_seed=4, max_rollouts=16, temperature=3.0),
        tpo=TPOConfig(num_epochs=1, batch_size=2),
        ppo=PPOConfig(num_iterations=2, num_episodes=4, minibatch_size=64, checkpoint_every=1),
        evaluation=EvalConfig(num_episodes=4, num_videos=0),
    )
    return dataclasses.replace(config, **changes)


def replace_simulator(monkeypatch):
    """Lets `run_ipi` find the toy where it looks for PushCube, and the small policy."""
    for module in (ipi, plan, load):
        monkeypatch.setattr(module, "make_policy", make_policy)
    monkeypatch.setattr(ipi, "make_vec_env", lambda config: DressedToy(config.num_envs))
    monkeypatch.setattr(ipi, "make_expert", lambda env_id: Expert(lambda: None, _act, (1.0,) * 7))
    monkeypatch.setattr(DressedToy, "num_started", 0)
    monkeypatch.setattr(EnvConfig, "state_dim", toy.STATE_DIM)
