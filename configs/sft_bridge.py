"""Imitation of a real robot's demonstrations: Bridge V2, or another data set that was imported from RLDS.

    python launch/import_rlds.py --data=~/tfds/bridge_dataset/1.0.0 --name=bridge_orig --image-size=64 --out=data/bridge
    python launch/train.py --config=configs/sft_bridge.py --config.demos_from=data/bridge
    python launch/train.py --config=configs/sft_bridge.py:7b --config.demos_from=data/bridge_224 \\
        --config.init_from=/path/to/openvla-7b

Nothing is evaluated, so no simulator is needed. `--config.evaluation.num_episodes=100` evaluates in the simulated
WidowX, in the task that is named after a comma: `--config=configs/sft_bridge.py:tiny,PutSpoonOnTableClothInScene-v1`.
The tiny policy, a million parameters on two CPU cores, only shows that everything works; no success is expected of it.
The 7B one has OpenVLA's own settings and needs a node of eight 80 GB accelerators, see `--plan`.
"""

import dataclasses

from configs.presets import base_config, imitation_on_cpu, make_model
from stare_jax.envs import EnvConfig
from stare_jax.models import openvla_tiny


def get_config(arg: str = "tiny"):
    """Returns the configuration; `arg` is "tiny" or "7b", then, after a comma, one of the WidowX tasks."""
    preset, _, env_id = arg.partition(",")
    if preset not in ("tiny", "7b"):
        raise ValueError(f"sft_bridge: got {preset!r}, expected 'tiny' or '7b'")
    is_tiny = preset == "tiny"
    env = EnvConfig(
        env_id or "PutCarrotOnPlateInScene-v1",
        image_size=64 if is_tiny else 224,
        gripper_threshold=0.5,  # 1 is open there, and 0 closed
    )
    # Instructions are people's own words, and the tiny policy spells those that it does not know.
    if is_tiny:
        model = openvla_tiny(camera="3rd_view_camera", prompt_length=160)
    else:
        model = dataclasses.replace(make_model({"full"}, camera="3rd_view_camera"), prompt_length=128)
    config = base_config(env, model, name=f"sft_bridge_{preset}")
    config.phases = ("sft",)
    config.demos_of = "bridge_orig"
    config.evaluation.num_episodes = 0

    if is_tiny:
        imitation_on_cpu(config, num_steps=2000)
    else:
        config.sft.num_steps = 2000
        config.sft.optimizer.learning_rate = 2e-5
        config.sft.optimizer.weight_decay = 0.0
        config.sft.batch_size = 256
        config.sft.microbatch_size = 64
        config.mesh.fsdp = 8
    return config
