"""Methods on PushCube from images: a weak imitation, then PPO until the task is learned.

    python launch/train.py --config=configs/study_pushcube_images.py                STA-PPO
    python launch/train.py --config=configs/study_pushcube_images.py:ppo            PPO without shaping, as many steps
    python launch/train.py --config=configs/study_pushcube_images.py:sta_ppo_zero   potentials that end at zero
    python launch/train.py --config=configs/study_pushcube_images.py:ipi            STA-TPO between the two

Expect 63 % after imitation, then 94 % with "ppo" and 91 % with "sta_ppo_zero" (one seed, 300 episodes, sampled,
docs/ppo.md); the others have not been measured here. Imitation takes ten minutes on two CPU cores, preference a few,
PPO 65 minutes on one.
"""

from configs.methods import set_method
from configs.presets import (
    base_config,
    demos_with_recoveries,
    imitation_on_cpu,
    interaction_on_cpu,
    preference_on_cpu,
)
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny


def get_config(method: str = "sta_ppo"):
    """Returns the configuration; `method` is one of `methods.METHODS`."""
    env = EnvConfig("PushCube-v1", horizon=30, image_size=64, use_state="low_dim")
    # The policy sees the image and the instruction; its critic, which is gone after training, sees the state.
    model = openvla_tiny(env.state_dim, critic="state", label_width=30.0)
    config = base_config(env, model, name=f"study_pushcube_images_{method}")
    set_method(config, method)
    demos_with_recoveries(config)
    imitation_on_cpu(config, num_steps=1000)
    preference_on_cpu(config)
    interaction_on_cpu(config)
    # Four epochs over the same decisions, which suit the state, made a policy that sees images worse (docs/ppo.md).
    # Hence more fresh decisions, each learnt from once.
    config.ppo.num_iterations = 70
    config.ppo.num_episodes = 192
    config.ppo.num_epochs = 1
    config.ppo.minibatch_size = 256
    config.ppo.optimizer.learning_rate = 2e-4
    config.ppo.value_warmup_iterations = 2
    return config
