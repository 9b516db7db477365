"""IPI on PushCube from images, from nothing: demonstrations, SFT, STA-TPO, STA-PPO, evaluation, films, report.

    python launch/train.py --config=configs/quickstart.py        from images alone
    python launch/train.py --config=configs/quickstart.py:tcp    with the end-effector's position in the prompt
    python launch/train.py --config=configs/quickstart.py:pi05   the same with pi0.5, a flow over chunks of actions

Expect 94 to 99 % success from images alone, and about 94 % of pi0.5, on 100 fresh episodes, in ten to twelve minutes on
two CPU cores. A policy
of a million parameters, 64 x 64 images, 30 actions an episode. Ten minutes are too few for PPO to add much to that;
configs/ipi_pushcube.py gives it an hour, from a weaker start.
"""

from configs.common import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny, pi05_tiny


def get_config(variant: str = ""):
    """`variant` is "", "tcp" or "pi05"."""
    if variant not in ("", "tcp", "pi05"):
        raise ValueError(f"quickstart: got {variant!r}, expected 'tcp', 'pi05' or nothing")
    use_state = "tcp" if variant == "tcp" else "low_dim"
    env = EnvConfig("PushCube-v1", num_workers=2, horizon=30, image_size=64, use_state=use_state)
    # Without "tcp" the policy sees images alone; its critic, which is gone after training, sees the state.
    if variant == "pi05":
        model = pi05_tiny(env.state_dim, critic="state")
    else:
        model = openvla_tiny(env.state_dim, critic="own" if variant else "state")
    config = base_config(env, model, name=f"quickstart_{variant}".strip("_"))
    config.stages.progressive = True

    config.demos.num_demos = 760
    config.demos.noise_scales = ((0.0, 100.0), (0.15, 594.0), (0.3, 66.0))

    config.sft.num_steps = 1200
    config.sft.optimizer.learning_rate = 1e-3
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 50
    config.sft.checkpoint_every = 300

    config.pairs.num_pairs = 50
    config.pairs.rollouts_per_seed = 4
    config.pairs.max_rollouts = 160
    config.tpo.num_epochs = 2
    config.tpo.optimizer.learning_rate = 1e-5
    config.tpo.batch_size = 4
    config.tpo.checkpoint_every = 10

    config.ppo.num_iterations = 5
    config.ppo.num_episodes = 64
    config.ppo.num_epochs = 1  # further ones add nothing from images (docs/ppo.md)
    config.ppo.temperature = 0.5  # nearer to the greedy policy that is evaluated
    config.ppo.minibatch_size = 128
    config.ppo.target_kl = 0.05
    # With a bootstrapped time limit, a potential of 1 in the goal region makes waiting there worth as much as success:
    # on the toy that ended at no success at all, on five seeds of five.
    config.ppo.time_limit = "terminate"
    config.ppo.value_warmup_iterations = 1
    config.ppo.optimizer.learning_rate = 5e-5
    config.ppo.optimizer.value_learning_rate = 1e-3
    config.ppo.checkpoint_every = 1

    config.evaluation.num_episodes = 100
    if variant == "pi05":
        set_flow(config)
    return config


def set_flow(config):
    """Sets what differs where a chunk of actions flows from noise."""
    config.tpo.beta = 0.3
    config.tpo.optimizer.learning_rate = 3e-6  # at 1e-5 the policy lost four points, twice
    config.ppo.temperature = 1.0  # less noise explores nothing, and what is evaluated has none either way
    config.ppo.optimizer.learning_rate = 1e-5
