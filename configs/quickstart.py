"""IPI on PushCube from images, from nothing: demonstrations, SFT, STA-TPO, STA-PPO, evaluation, films, report.

    python launch/train.py --config=configs/quickstart.py        from images alone
    python launch/train.py --config=configs/quickstart.py:tcp    with the end-effector's position in the prompt
    python launch/train.py --config=configs/quickstart.py:pi05   the same with pi0.5, a flow over chunks of actions

Two CPU cores, ten minutes after the set-up. The policy has a million parameters, images are 64 x 64. An episode has 16
actions, which are few, and the expert's arm pauses at two of ten, so that its imitation succeeds in two of three
episodes, and what PPO adds can be seen. With pi0.5 there are 30 actions and no pauses. docs/quickstart.md has numbers.
"""

import ml_collections

from configs.presets import base_config, demos_with_recoveries, imitation_on_cpu, preference_on_cpu
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny, pi05_tiny


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is "", "tcp" or "pi05"."""
    if variant not in ("", "tcp", "pi05"):
        raise ValueError(f"quickstart: got {variant!r}, expected 'tcp', 'pi05' or nothing")
    use_state = "tcp" if variant == "tcp" else "low_dim"
    horizon = 30 if variant == "pi05" else 16
    env = EnvConfig("PushCube-v1", num_workers=2, horizon=horizon, image_size=64, use_state=use_state)
    # Without "tcp" the policy sees images alone; its critic, which is gone after training, sees the state.
    if variant == "pi05":
        model = pi05_tiny(env.state_dim, critic="state")
    else:
        model = openvla_tiny(env.state_dim, critic="own" if variant else "state")
    config = base_config(env, model, name=f"quickstart_{variant}".strip("_"))
    demos_with_recoveries(config)
    imitation_on_cpu(config, num_steps=1200 if variant == "pi05" else 1050)
    preference_on_cpu(config)

    config.stages.progressive = True
    config.ppo.num_episodes = 64
    config.ppo.num_epochs = 1  # further ones add nothing from images (docs/ppo.md)
    config.ppo.minibatch_size = 128
    config.ppo.target_kl = 0.05
    config.ppo.time_limit = "terminate"
    config.ppo.terminal_potential = "keep"
    config.ppo.value_warmup_iterations = 1
    config.ppo.checkpoint_every = 1
    config.evaluation.num_episodes = 100
    if variant == "pi05":
        _flow(config)
    else:
        _from_pauses(config)
    return config


def _from_pauses(config: ml_collections.ConfigDict) -> None:
    """Demonstrations whose arm pauses, and little time: a start that PPO improves at the temperature of evaluation."""
    config.demos.num_demos = 350
    config.demos.hesitation = 0.2
    config.demos.idle_translation = -1.0  # pauses are imitated
    config.demos.linger = 5  # so is staying where the cube is at its goal
    config.ppo.num_iterations = 12
    config.ppo.temperature = config.evaluation.temperature = 0.6
    config.ppo.gamma = 0.95
    config.ppo.gae_lambda = 0.8
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.optimizer.value_learning_rate = 3e-3


def _flow(config: ml_collections.ConfigDict) -> None:
    """A chunk of actions that flows from noise learns at other rates."""
    config.tpo.beta = 0.3
    config.tpo.optimizer.learning_rate = 3e-6  # at 1e-5 the policy lost four points, twice
    config.ppo.num_iterations = 5
    config.ppo.temperature = 1.0  # less noise explores nothing, and none is in what is evaluated
    config.ppo.optimizer.learning_rate = 1e-5
    config.ppo.optimizer.value_learning_rate = 1e-3
