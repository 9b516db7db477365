"""A run directory with checkpoints of a small policy, and the evaluation command with the toy as its simulator."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from stare_jax.config import to_dict
from stare_jax.envs import EnvConfig, toy
from stare_jax.evaluate.protocol import EvalConfig
from stare_jax.models import openvla_tiny
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.runs import load
from stare_jax.runs.config import RunConfig
from stare_jax.stages import get_task
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.train_state import TrainState


def load_command():
    """Returns `launch/evaluate.py` as a module."""
    path = Path(__file__).parents[2] / "launch/evaluate.py"
    module_spec = importlib.util.spec_from_file_location("launch_evaluate", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def write_run(directory):
    """Writes checkpoints of the steps 1 and 2 of PPO, and a configuration of 7 evaluation episodes; returns the policy.

    The model of the configuration is another one: see `use_toy`.
    """
    evaluation = EvalConfig(num_episodes=7, num_videos=0)
    config = RunConfig(EnvConfig(num_workers=4), openvla_tiny(), get_task("PushCube-v1").params, evaluation=evaluation)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    policy = make_mlp(MLPConfig(), toy.norm_stats())
    params = jax.jit(policy.init)(jax.random.key(0))
    with Checkpoints(directory / "ppo/checkpoints") as checkpoints:
        for step in (1, 2):
            state = TrainState(jnp.int32(step), params, {}, optax.sgd(0.1).init(params))
            checkpoints.save(step, state, norm_stats=toy.norm_stats(), model={}, counters={})
    return policy


def use_toy(command, policy, patch):
    """Gives the command the toy as a simulator, and the policy as that of every run."""
    patch.setattr(load, "make_policy", lambda config, norm_stats: policy)
    patch.setattr(command, "make_vec_env", lambda config: toy.ToyPush(config.num_envs))
    patch.setattr(EnvConfig, "state_dim", toy.STATE_DIM)
    patch.setattr(EnvConfig, "action_dim", policy.action_dim)
