"""IPI without its preference phase on PushCube from images: a weak imitation, then PPO until the task is learned.

    python launch/train.py --config=configs/ipi_pushcube.py              STA-PPO
    python launch/train.py --config=configs/ipi_pushcube.py:ppo          PPO without shaping, as many steps

From 63 % to 91 %, and 94 % without shaping (300 episodes, sampled), in 65 minutes on one core each, after ten minutes
of imitation on two; `--resume` goes on with a run that was stopped.
"""

from configs.common import base_config
from configs.study_pushcube_state import set_interaction
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny


def get_config(algorithm: str = "sta_ppo"):
    """`algorithm` is "ppo" or "sta_ppo"."""
    env = EnvConfig("PushCube-v1", horizon=30, image_size=64, use_state="low_dim")
    # The policy sees the image and the instruction; its critic, which is gone after training, sees the state.
    model = openvla_tiny(env.state_dim, critic="state", label_width=30.0)
    config = base_config(env, model, name=f"ipi_pushcube_{algorithm}")
    config.phases = ("sft", "ppo")

    config.demos.num_demos = 760
    config.demos.noise_scales = ((0.0, 100.0), (0.15, 594.0), (0.3, 66.0))

    config.sft.num_steps = 1000
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = 250

    set_interaction(config, algorithm)
    # Four epochs over the same decisions, as suit the state, made a policy with eyes worse (docs/ppo.md). Hence more
    # fresh decisions, each learnt from once.
    config.ppo.num_iterations = 70
    config.ppo.num_episodes = 192
    config.ppo.num_epochs = 1
    config.ppo.minibatch_size = 256
    config.ppo.optimizer.learning_rate = 2e-4
    config.ppo.value_warmup_iterations = 2
    return config
