"""The paper's recipe on the SimplerEnv WidowX tasks (B, C): OpenVLA-7B, 100 demonstrations, 50 pairs, PPO.

    python launch/train.py --config=configs/ipi_widowx.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1 --plan
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1,full --plan

The paper reports 98.0 % over the four tasks (table 1), on 300 episodes of 60 actions. A node of eight 80 GB
accelerators; `--plan` prints what goes where.
"""

from configs.common import base_config
from configs.ipi_maniskill import fine_tuned, paper_recipe
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_7b


def get_config(variant: str = "PutCarrotOnPlateInScene-v1"):
    """`variant` is one of the four WidowX tasks, with ",full" behind it where all weights are to be trained."""
    env_id, _, tuning = variant.partition(",")
    env = EnvConfig(env_id, num_workers=64, envs_per_worker=1, horizon=60, image_size=224, gripper_threshold=0.5)
    return paper_recipe(base_config(env, fine_tuned(openvla_7b(), tuning), name=f"ipi_{variant.replace(',', '_')}"))
