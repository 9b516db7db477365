"""Stage-aware PPO, through the library's own loop, learns the toys with a gripper from a weak imitation."""

import jax
import numpy as np
import pytest
from toy_learning import make_policy
from toy_start import make_start
from toy_task import Writer

from stare_jax.envs.toys import TOYS, ToyEnv
from stare_jax.state.optimizer import OptimizerConfig
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, train_ppo

CONFIG = PPOConfig(
    num_iterations=40,
    num_episodes=128,
    num_epochs=4,
    minibatch_size=1024,
    optimizer=OptimizerConfig(learning_rate=3e-3, value_learning_rate=6e-3, max_grad_norm=10.0),
    checkpoint_every=1000,
)
IMITATION_STEPS = {"place": 600, "lift": 300}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMITATION_STEPS)
def test_stage_aware_ppo_learns_from_a_weak_imitation(name, tmp_path):
    toy = TOYS[name]
    params, success = make_start(toy)(np.arange(1), np.int32(IMITATION_STEPS[name]), np.float32(toy.max_step))
    assert 0.03 < success[0] < 0.4
    run = Run(tmp_path, toy.norm_stats, writer=Writer())
    params = jax.tree.map(lambda x: x[0], params)
    train_ppo(make_policy(toy), params, ToyEnv(toy, 128), toy.spec, CONFIG, run)
    curve = run.writer.column("env/success")
    print(f"{name}: {np.round(curve[::5], 2)}")
    assert np.mean(curve[-5:]) > success[0] + 0.3
