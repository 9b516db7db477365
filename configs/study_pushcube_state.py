"""PPO and STA-PPO on PushCube from the low-dimensional state: no images, no graphics driver, minutes on two CPU cores.

    python launch/train.py --config=configs/study_pushcube_state.py               STA-PPO
    python launch/train.py --config=configs/study_pushcube_state.py:ppo           PPO without shaping

The rig for studying algorithms: the policy starts from an imitation of few demonstrations that succeeds about every
second time.
"""

from configs.common import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state


def get_config(algorithm: str = "sta_ppo"):
    """`algorithm` is "ppo" or "sta_ppo"."""
    if algorithm not in ("ppo", "sta_ppo"):
        raise ValueError(f"study_pushcube_state: got {algorithm!r}, expected 'ppo' or 'sta_ppo'")
    env = EnvConfig("PushCube-v1", horizon=30, image_size=0, use_state="low_dim")
    config = base_config(env, openvla_state(state_dim=env.state_dim), name=f"study_pushcube_state_{algorithm}")
    config.phases = ("sft", "ppo")
    config.stages.progressive = True

    config.demos.num_demos = 50
    config.demos.noise_scales = ((0.0, 1.0),)

    config.sft.num_steps = 300
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = 300

    config.ppo.shaping = algorithm == "sta_ppo"
    config.ppo.num_iterations = 60
    config.ppo.num_episodes = 128
    config.ppo.num_epochs = 4
    config.ppo.minibatch_size = 256
    config.ppo.target_kl = 0.05
    config.ppo.time_limit = "terminate"
    config.ppo.value_warmup_iterations = 1
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.optimizer.value_learning_rate = 1e-3
    config.ppo.checkpoint_every = 10

    config.evaluation.num_episodes = 100
    config.evaluation.num_videos = 0
    return config
