"""IPI on PushCube from images, from nothing: demonstrations, SFT, STA-TPO, STA-PPO, evaluation, films, report.

    python launch/train.py --config=configs/quickstart.py        from images alone
    python launch/train.py --config=configs/quickstart.py:tcp    with the end-effector's position in the prompt

Ten minutes on two CPU cores and no GPU. A policy of a million parameters, 64 x 64 images, 30 actions an episode.
"""

from configs.common import base_config
from configs.study_pushcube_state import set_interaction
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny


def get_config(state: str = ""):
    """`state` is "" or "tcp"."""
    if state not in ("", "tcp"):
        raise ValueError(f"quickstart: got {state!r}, expected 'tcp' or nothing")
    env = EnvConfig("PushCube-v1", horizon=30, image_size=64, use_state=state or "low_dim")
    # The policy sees images alone, or the position too; a critic, which is gone after training, may see the state.
    model = openvla_tiny(env.state_dim, critic="own" if state else "state", label_width=10.0)
    config = base_config(env, model, name=f"quickstart_{state}".strip("_"))

    config.demos.num_demos = 760
    config.demos.noise_scales = ((0.0, 100.0), (0.15, 594.0), (0.3, 66.0))

    config.sft.num_steps = 1000
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = 250

    config.pairs.num_pairs = 50
    config.pairs.rollouts_per_seed = 4
    config.pairs.max_rollouts = 160
    config.tpo.num_epochs = 2
    config.tpo.optimizer.learning_rate = 1e-5
    config.tpo.batch_size = 4
    config.tpo.checkpoint_every = 10

    set_interaction(config, "sta_ppo")
    config.ppo.num_iterations = 10
    config.ppo.num_episodes = 128
    config.ppo.num_epochs = 1
    config.ppo.minibatch_size = 256
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.checkpoint_every = 1

    config.evaluation.num_episodes = 100
    return config
