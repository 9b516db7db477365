"""Run by test_interruption.py as a process of its own: PPO on the toy until a signal stops it."""

import sys
from pathlib import Path

import jax

from stare_jax.envs import toy
from stare_jax.logging import Interrupted, Interruption, make_writer
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, train_ppo

NUM_ENVS = 16
STOPPED = 7
"""exit status of a run that was stopped and has saved."""


def train(directory, num_iterations, **fields):
    policy = make_mlp(MLPConfig(hidden_dims=(16,), value_dims=(16,), label_width=0.5), toy.norm_stats())
    config = PPOConfig(num_iterations=num_iterations, num_episodes=20, minibatch_size=256, checkpoint_every=10**6)
    params = jax.jit(policy.init)(jax.random.key(0))
    run = Run(directory, toy.norm_stats(), **fields)
    return train_ppo(policy, params, toy.ToyPush(NUM_ENVS), toy.task_spec(), config, run)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    with Interruption() as interruption, make_writer(directory, tensorboard=False) as writer:
        try:
            train(directory, 10**6, writer=writer, should_stop=lambda: interruption.requested)
        except Interrupted as stopped:
            print(stopped)
            sys.exit(STOPPED)
