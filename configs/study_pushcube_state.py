"""PPO and STA-PPO on PushCube from the low-dimensional state: no images, no graphics driver.

    python launch/train.py --config=configs/study_pushcube_state.py               STA-PPO
    python launch/train.py --config=configs/study_pushcube_state.py:ppo           PPO without shaping
    python launch/train.py --config=configs/study_pushcube_state.py:paper         STA-PPO with the paper's potentials
    python launch/train.py --config=configs/study_pushcube_state.py:zero          potentials that end at zero
    python launch/train.py --config=configs/study_pushcube_state.py:sta_ppo,pi05  any of them with pi0.5

The rig for studying algorithms: the policy starts from an imitation of few demonstrations that succeeds about every
second time. Expect 95 to 98 % with "ppo" and 96 to 97 % with "zero" (three seeds, 300 episodes, docs/ppo.md); the
others have not been measured here. One CPU core, 17 to 22 minutes.
"""

from configs.presets import base_config, imitation_on_cpu, interaction_on_cpu
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state, pi05_state


def get_config(variant: str = "sta_ppo"):
    """Returns the configuration; `variant` is one of `presets.ALGORITHMS`, with ",pi05" behind it for pi0.5."""
    algorithm, _, model = variant.partition(",")
    if model not in ("", "pi05"):
        raise ValueError(f"variant: got {model!r} behind the algorithm, expected 'pi05' or nothing")
    env = EnvConfig("PushCube-v1", horizon=30, image_size=0, use_state="low_dim")
    model = pi05_state(env.state_dim) if model else openvla_state(env.state_dim, label_width=30.0)
    config = base_config(env, model, name=f"study_pushcube_state_{variant.replace(',', '_')}")
    config.phases = ("sft", "ppo")
    config.demos.num_demos = 80
    config.demos.noise_scales = ((0.0, 1.0),)
    imitation_on_cpu(config, num_steps=400)
    if "pi05" in variant:  # With 80 demonstrations a flow succeeds in 97 %.
        config.demos.num_demos = 16
        config.sft.num_steps = 150
    interaction_on_cpu(config, algorithm)
    config.evaluation.num_videos = 0
    return config
