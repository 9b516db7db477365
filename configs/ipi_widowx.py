"""The paper's recipe on the SimplerEnv WidowX tasks (B, C): OpenVLA-7B or pi0.5, 100 demonstrations, 50 pairs, PPO.

    python launch/train.py --config=configs/ipi_widowx.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1 --plan
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1,full --plan
    python launch/train.py --config=configs/ipi_widowx.py:pi05 --plan
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1,pi05,full --plan

The paper reports 98.0 % over the four tasks (table 1), on 300 episodes of 60 actions. A node of eight 80 GB
accelerators; `--plan` prints what goes where.
"""

from configs.common import base_config, split_variant
from configs.recipes import WORDS, make_model, set_recipe
from stare_jax.envs import EnvConfig

TASKS = (
    "PutCarrotOnPlateInScene-v1",
    "PutSpoonOnTableClothInScene-v1",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "PutEggplantInBasketScene-v1",
)


def get_config(variant: str = ""):
    """`variant` is one of the four WidowX tasks, the carrot if none, and words of `recipes.WORDS`, comma-separated."""
    env_id, words = split_variant(variant, tasks=TASKS, words=WORDS)
    # OpenVLA's gripper is 1 open and 0 closed; pi0.5 takes whatever range its demonstrations have.
    threshold = None if "pi05" in words else 0.5
    env = EnvConfig(env_id, num_workers=64, envs_per_worker=1, horizon=60, image_size=224, gripper_threshold=threshold)
    name = "_".join(["ipi", env_id, *sorted(words)])
    return set_recipe(base_config(env, make_model(words, camera="3rd_view_camera"), name=name))
