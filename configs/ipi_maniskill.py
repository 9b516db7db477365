"""The paper's recipe on ManiSkill3's Franka tasks (B, C): OpenVLA-7B, 100 demonstrations, 50 pairs, PPO.

    python launch/train.py --config=configs/ipi_maniskill.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1 --plan
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,full --plan    # all weights, not adapters

The paper reports 96.4 % over PushCube, PullCube, StackCube and LiftPegUpright (table 2), on 300 episodes of 30 actions.
A node of eight 80 GB accelerators; `--plan` prints what goes where.
"""

import dataclasses

from configs.common import base_config
from stare_jax.envs import EnvConfig
from stare_jax.models import LoRAConfig, openvla_7b


def get_config(variant: str = "PushCube-v1"):
    """`variant` is one of the four Franka tasks, with ",full" behind it where all weights are to be trained."""
    env_id, _, tuning = variant.partition(",")
    env = EnvConfig(env_id, num_workers=64, envs_per_worker=1, horizon=30, image_size=224)
    model = fine_tuned(openvla_7b(camera="base_camera"), tuning)
    return paper_recipe(base_config(env, model, name=f"ipi_{variant.replace(',', '_')}"))


def fine_tuned(model, tuning):
    """Says what of a model is trained: adapters of rank 32 beside bfloat16 weights, or float32 weights."""
    changes = {
        "": {"lora": LoRAConfig()},
        "full": {"execution": dataclasses.replace(model.execution, param_dtype="float32")},
    }
    if tuning not in changes:
        raise ValueError(f"variant: got {tuning!r} behind the task, expected 'full' or nothing")
    return dataclasses.replace(model, **changes[tuning])


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
