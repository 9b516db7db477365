"""Methods on PushCube from the low-dimensional state: no images, no graphics driver.

    python launch/train.py --config=configs/study_pushcube_state.py                STA-PPO
    python launch/train.py --config=configs/study_pushcube_state.py:ppo            PPO without shaping
    python launch/train.py --config=configs/study_pushcube_state.py:sta_ppo_paper  STA-PPO with the paper's potentials
    python launch/train.py --config=configs/study_pushcube_state.py:sta_ppo_zero   potentials that end at zero
    python launch/train.py --config=configs/study_pushcube_state.py:sta_ppo,pi05   any of `methods.METHODS` with pi0.5

The rig for studying algorithms: the policy starts from an imitation of few demonstrations that succeeds about every
second time. Expect 95 to 98 % with "ppo" and 96 to 97 % with "sta_ppo_zero" (three seeds, 300 episodes, docs/ppo.md);
the others have not been measured here. One CPU core, 17 to 22 minutes.
"""

from configs.methods import METHODS, named_method, set_method
from configs.presets import base_config, imitation_on_cpu, interaction_on_cpu, preference_on_cpu, split_variant
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_state, pi05_state


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is one of `methods.METHODS`, STA-PPO if none, and "pi05" for pi0.5."""
    (env_id,), words = split_variant(variant, tasks=("PushCube-v1",), words=("pi05", *METHODS))
    method, is_flow = named_method(words, default="sta_ppo"), "pi05" in words
    env = EnvConfig(env_id, horizon=30, image_size=0, use_state="low_dim")
    model = pi05_state(env.state_dim) if is_flow else openvla_state(env.state_dim, label_width=30.0)
    config = base_config(env, model, name="_".join(["study_pushcube_state", method, *(["pi05"] if is_flow else [])]))
    set_method(config, method)
    config.demos.num_demos = 80
    config.demos.noise_scales = ((0.0, 1.0),)
    imitation_on_cpu(config, num_steps=400)
    if is_flow:  # With 80 demonstrations a flow succeeds in 97 %.
        config.demos.num_demos = 16
        config.sft.num_steps = 150
    preference_on_cpu(config)
    interaction_on_cpu(config)
    config.evaluation.num_videos = 0
    return config
