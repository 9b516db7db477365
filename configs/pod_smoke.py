"""IPI on a toy in pure JAX, drawn by JAX: the first thing to run on a new machine, slice or cluster.

    python launch/train.py --config=configs/pod_smoke.py          OpenVLA's small form, from pixels
    python launch/train.py --config=configs/pod_smoke.py:pi05     pi0.5's small form, from pixels
    python launch/train.py --config=configs/pod_smoke.py:state    an MLP, from the state: seconds

It needs no simulator, no graphics driver, no weights and no data, and goes through every phase: demonstrations, SFT,
STA-TPO, STA-PPO, evaluation, films, report. It says whether a machine works, not how well policies learn.
"""

from configs.presets import base_config, imitation_on_cpu
from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig, openvla_tiny, pi05_tiny

VARIANTS = ("", "pi05", "state")


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"pod_smoke: got {variant!r}, expected 'pi05', 'state' or nothing")
    pixels = 0 if variant == "state" else 64
    env = EnvConfig("ToyPush-v0", num_workers=1, envs_per_worker=16, image_size=pixels, use_state="low_dim")
    if variant == "state":
        model = MLPConfig(action_dim=env.action_dim, state_dim=env.state_dim, hidden_dims=(64, 64), value_dims=(64,))
    elif variant == "pi05":
        model = pi05_tiny(env.state_dim, critic="state", action_dim=env.action_dim, chunk=1)
    else:
        model = openvla_tiny(env.state_dim, critic="state", action_dim=env.action_dim)
    config = base_config(env, model, name=f"pod_smoke_{variant}".strip("_"))
    config.stages.progressive = True
    config.demos.num_demos = 64
    imitation_on_cpu(config, num_steps=300 if variant == "state" else 200)
    config.pairs.num_pairs = 16
    config.pairs.rollouts_per_seed = 4
    config.pairs.max_rollouts = 64
    config.tpo.num_epochs = 1
    config.tpo.batch_size = 8
    config.tpo.optimizer.learning_rate = 1e-5
    config.ppo.num_iterations = 2
    config.ppo.num_episodes = 32
    config.ppo.minibatch_size = 128
    config.ppo.optimizer.learning_rate = 5e-5
    config.ppo.checkpoint_every = 1
    config.evaluation.num_episodes = 64
    return config
