"""PPO and STA-PPO on PushCube from the low-dimensional state: no images, no graphics driver, minutes on two CPU cores.

    python launch/train.py --config=configs/study_pushcube_state.py               STA-PPO
    python launch/train.py --config=configs/study_pushcube_state.py:ppo           PPO without shaping
    python launch/train.py --config=configs/study_pushcube_state.py:sta_ppo,pi05  either of them with pi0.5

The rig for studying algorithms: the policy starts from an imitation of few demonstrations that succeeds about every
second time.
"""

from configs.common import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state, pi05_state


def get_config(variant: str = "sta_ppo"):
    """`variant` is "ppo" or "sta_ppo", with ",pi05" behind it for pi0.5."""
    algorithm, _, model = variant.partition(",")
    if model not in ("", "pi05"):
        raise ValueError(f"variant: got {model!r} behind the algorithm, expected 'pi05' or nothing")
    env = EnvConfig("PushCube-v1", horizon=30, image_size=0, use_state="low_dim")
    model = pi05_state(env.state_dim) if model else openvla_state(env.state_dim, label_width=30.0)
    config = base_config(env, model, name=f"study_pushcube_state_{variant.replace(',', '_')}")
    config.phases = ("sft", "ppo")

    config.demos.num_demos = 80
    config.demos.noise_scales = ((0.0, 1.0),)

    config.sft.num_steps = 400
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = 400

    if "pi05" in variant:  # With 80 demonstrations a flow succeeds in 97 %.
        config.demos.num_demos = 16
        config.sft.num_steps = 150

    set_interaction(config, algorithm)
    config.evaluation.num_videos = 0
    return config


def set_interaction(config, algorithm: str):
    """Sets PPO as it was found to learn PushCube; `docs/ppo.md` says what each number does."""
    if algorithm not in ("ppo", "sta_ppo"):
        raise ValueError(f"algorithm: got {algorithm!r}, expected 'ppo' or 'sta_ppo'")
    config.stages.progressive = True
    config.ppo.shaping = algorithm == "sta_ppo"
    config.ppo.num_iterations = 120
    config.ppo.num_episodes = 96
    config.ppo.num_epochs = 4
    config.ppo.minibatch_size = 512
    config.ppo.target_kl = 0.15
    config.ppo.gae_lambda = 0.8
    config.ppo.time_limit = "terminate"
    config.ppo.value_warmup_iterations = 1
    config.ppo.optimizer.learning_rate = 3e-4
    config.ppo.optimizer.value_learning_rate = 3e-3
    config.ppo.optimizer.warmup_steps = 20
    config.ppo.optimizer.schedule = "linear"
    config.ppo.checkpoint_every = 10
    # The policy is judged as it acts: an arg max over bins that were taught to be blurred is another, worse policy.
    config.evaluation.temperature = 1.0
    config.evaluation.num_episodes = 300
