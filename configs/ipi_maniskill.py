"""The paper's recipe on ManiSkill3's Franka tasks (B, C): OpenVLA-7B or pi0.5, 100 demonstrations, 50 pairs, PPO.

One policy learns all four tasks, from as many demonstrations and pairs of each, unless one of them is named.

    python launch/train.py --config=configs/ipi_maniskill.py --config.init_from=/path/to/openvla-7b \\
        --config.model.tokenizer=/path/to/openvla-7b
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1 --plan
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,full --plan    # all weights, not adapters
    python launch/train.py --config=configs/ipi_maniskill.py:pi05 --plan                 # the action expert alone
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,pi05,lora --plan
    python launch/train.py --config=configs/ipi_maniskill.py:pi05,one_gpu --plan         # for one device of 80 GB
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,ppo --plan     # a row of the table: SFT, PPO
    python launch/train.py --config=configs/ipi_maniskill.py:StackCube-v1,pi05,pi_rl --plan  # another: pi_RL

The paper reports 96.4 % over PushCube, PullCube, StackCube and LiftPegUpright (table 2), on 300 episodes of 30 actions;
nobody has run this here. A node of eight 80 GB accelerators, or one of them with `one_gpu`, which does not go with
`full`; `--plan` prints how the model is laid out, docs/plan.md says how long it takes at least.
"""

from configs.presets import WORDS, base_config, make_model, set_recipe, split_variant
from stare_jax.envs import EnvConfig

TASKS = ("PushCube-v1", "PullCube-v1", "StackCube-v1", "LiftPegUpright-v1")


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is a task, all four if none, and `presets.WORDS`, comma-separated."""
    tasks, words = split_variant(variant, tasks=TASKS, words=WORDS)
    env = EnvConfig(tasks=tasks, num_workers=64, envs_per_worker=1, horizon=30, image_size=224)
    name = "_".join(["ipi", *(tasks if len(tasks) == 1 else ["maniskill"]), *sorted(words)])
    config = base_config(env, make_model(words, camera="base_camera"), name=name)
    set_recipe(config, words)
    return config
