"""The paper's recipe on ManiSkill3's Franka tasks (B, C): OpenVLA-7B, 100 demonstrations, 50 pairs, PPO.

    python launch/train.py --config=configs/ipi_maniskill.py --config.init_from=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1 --plan

The paper reports 96.4 % over PushCube, PullCube, StackCube and LiftPegUpright (table 2), on 300 episodes of 30 actions.
A node of eight 80 GB accelerators; `--plan` prints what goes where.
"""

from configs.common import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_7b


def get_config(env_id: str = "PushCube-v1"):
    """`env_id` is one of the four Franka tasks."""
    env = EnvConfig(env_id, num_workers=64, envs_per_worker=1, horizon=30, image_size=224)
    model = openvla_7b(camera="base_camera")
    return paper_recipe(base_config(env, model, name=f"ipi_{env_id}"))


def paper_recipe(config):
    """Sets the numbers of appendix B and C.2, and RL4VLA's where the paper is silent."""
    config.demos.num_demos = 100
    config.pairs.num_pairs = 50
    config.sft.num_steps = 30_000
    config.sft.batch_size = 64
    config.sft.optimizer.learning_rate = 1e-5
    config.tpo.num_epochs = 5
    config.tpo.batch_size = 8
    config.tpo.microbatch_size = 16
    config.tpo.optimizer.learning_rate = 2e-5
    config.ppo.num_iterations = 400
    config.ppo.num_episodes = 128
    config.ppo.minibatch_size = 160
    config.ppo.microbatch_size = 8
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.optimizer.value_learning_rate = 3e-3
    config.evaluation.num_episodes = 300
    config.mesh.fsdp = 8
    config.mesh.data = -1
    return config
