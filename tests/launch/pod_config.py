"""The configuration that tests of several processes train: all phases on the toy, a few optimiser steps each.

`pod_config.py:pushcube` has processes of simulators, which can be killed, and interaction alone after imitation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.pod_smoke import get_config as whole_config
from configs.presets import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig


def get_config(variant=""):
    config = whole_config("state")
    if variant == "pushcube":
        env = EnvConfig("PushCube-v1", num_workers=2, envs_per_worker=2, image_size=0, use_state="low_dim")
        config = base_config(env, MLPConfig(action_dim=env.action_dim, state_dim=env.state_dim), name="pod")
        config.phases = ("sft", "ppo")
        config.ppo.checkpoint_every = 1
    config.name = "pod"
    config.model.update(hidden_dims=(16,), value_dims=(16,))
    config.env.envs_per_worker = 2 if variant else 4
    config.demos.num_demos = 8
    config.sft.update(num_steps=4, batch_size=16, checkpoint_every=2, log_every=1)
    config.pairs.update(num_pairs=4, max_rollouts=32, temperature=3.0)
    config.tpo.batch_size = 8
    # All decisions of an iteration are in one minibatch: of several, each number of processes draws others.
    config.ppo.update(num_iterations=3, num_episodes=8, minibatch_size=512)
    config.evaluation.num_episodes = 0
    config.logging.tensorboard = False
    return config
