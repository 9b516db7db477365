"""The paper's recipe on ManiSkill3's Franka tasks (B, C): OpenVLA-7B or pi0.5, 100 demonstrations, 50 pairs, PPO.

    python launch/train.py --config=configs/ipi_maniskill.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1 --plan
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,full --plan    # all weights, not adapters
    python launch/train.py --config=configs/ipi_maniskill.py:pi05 --plan                 # the action expert alone
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,pi05,lora --plan

The paper reports 96.4 % over PushCube, PullCube, StackCube and LiftPegUpright (table 2), on 300 episodes of 30 actions.
A node of eight 80 GB accelerators; `--plan` prints what goes where.
"""

from configs.common import base_config, split_variant
from configs.recipes import WORDS, make_model, set_recipe
from stare_jax.envs import EnvConfig

TASKS = ("PushCube-v1", "PullCube-v1", "StackCube-v1", "LiftPegUpright-v1")


def get_config(variant: str = ""):
    """`variant` is one of the four Franka tasks, PushCube if none, and words of `recipes.WORDS`, comma-separated."""
    env_id, words = split_variant(variant, tasks=TASKS, words=WORDS)
    env = EnvConfig(env_id, num_workers=64, envs_per_worker=1, horizon=30, image_size=224)
    name = "_".join(["ipi", env_id, *sorted(words)])
    return set_recipe(base_config(env, make_model(words, camera="base_camera"), name=name))
