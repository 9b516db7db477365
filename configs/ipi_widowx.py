"""The paper's recipe on the SimplerEnv WidowX tasks (B, C): OpenVLA-7B or pi0.5, 100 demonstrations, 50 pairs, PPO.

One policy learns all four tasks, from as many demonstrations and pairs of each, unless one of them is named.

    python launch/train.py --config=configs/ipi_widowx.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1 --plan
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1,full --plan
    python launch/train.py --config=configs/ipi_widowx.py:pi05 --plan
    python launch/train.py --config=configs/ipi_widowx.py:PutSpoonOnTableClothInScene-v1,pi05,full --plan
    python launch/train.py --config=configs/ipi_widowx.py:pi05,one_gpu --plan    # for one device of 80 GB
    python launch/train.py --config=configs/ipi_widowx.py:rl4vla --plan    # a row of the table: SFT, RL4VLA

The paper reports 98.0 % over the four tasks (table 1), on 300 episodes of 60 actions; nobody has run this here. A node
of eight 80 GB accelerators, or one of them with `one_gpu`, which does not go with `full`; `--plan` prints how the model
is laid out, docs/plan.md says how long it takes at least.
"""

from configs.presets import WORDS, base_config, make_model, set_recipe, split_variant
from stare_jax.envs import EnvConfig

TASKS = (
    "PutCarrotOnPlateInScene-v1",
    "PutSpoonOnTableClothInScene-v1",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "PutEggplantInBasketScene-v1",
)


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is a task, all four if none, and `presets.WORDS`, comma-separated."""
    tasks, words = split_variant(variant, tasks=TASKS, words=WORDS)
    # The camera is 4:3. OpenVLA was trained on views squeezed into a square, pi0.5 on views between black bars.
    # OpenVLA's gripper is 1 open and 0 closed; pi0.5 takes the range of its demonstrations.
    height, threshold = (168, None) if "pi05" in words else (224, 0.5)
    env = EnvConfig(
        tasks=tasks,
        num_workers=64,
        envs_per_worker=1,
        horizon=60,
        image_size=height,
        image_width=224,
        gripper_threshold=threshold,
    )
    name = "_".join(["ipi", *(tasks if len(tasks) == 1 else ["widowx"]), *sorted(words)])
    config = base_config(env, make_model(words, camera="3rd_view_camera"), name=name)
    set_recipe(config, words)
    return config
