"""The paper's four Franka tasks from the low-dimensional state, at a size for one CPU core a run.

    python launch/train.py --config=configs/franka_state.py                         STA-PPO on StackCube
    python launch/train.py --config=configs/franka_state.py:LiftPegUpright-v1,ppo   any task, any of `methods.METHODS`
    python launch/train.py --config=configs/franka_state.py:StackCube-v1,ipi,pi05   with pi0.5
    python launch/train.py --config=configs/franka_state.py:all,ipi                 one policy for all four tasks
    python launch/study.py --study=configs/studies/franka_state.py                  the methods side by side

One set of numbers for all tasks and methods. A policy of 0.4 million parameters imitates demonstrations with noise,
then learns from about two hundred thousand steps. Its actions are spread over bins by `LABEL_WIDTH`, which is the noise
that it explores with; it is judged by the means of its action distributions, on 100 episodes every fifth iteration and
on 300 others at the end.
"""

import ml_collections

from configs.methods import METHODS, named_method, set_method
from configs.presets import (
    base_config,
    demos_with_recoveries,
    imitation_on_cpu,
    interaction_on_cpu,
    preference_on_cpu,
    split_variant,
)
from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig, openvla_state, pi05_state

TASKS = ("StackCube-v1", "LiftPegUpright-v1", "PushCube-v1", "PullCube-v1")
ALL = "all"
LABEL_WIDTH = 16.0
"""Bins, of 256, that the target of an action dimension is spread over in imitation."""


def get_config(variant: str = ""):
    """Returns the configuration; `variant` is a task or "all", a method, STA-PPO if none, and "pi05"."""
    return config_of_state(variant, TASKS, horizon=30, name="franka_state")


def config_of_state(variant: str, all_tasks: tuple[str, ...], *, horizon: int, name: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a policy of the state; see `get_config`.

    Args:
        variant: a task or "all", a method, and "pi05", comma-separated.
        all_tasks: of one robot.
        horizon: actions of an episode.
        name: first words of the run's name.
    """
    (task, *_), words = split_variant(variant, tasks=(*all_tasks, ALL), words=("pi05", *METHODS))
    method = named_method(words, default="sta_ppo")
    tasks = all_tasks if task == ALL else (task,)
    env = EnvConfig(
        tasks=tasks,
        num_workers=len(tasks),
        envs_per_worker=16 // len(tasks),
        horizon=horizon,
        image_size=0,
        use_state="low_dim",
    )
    if "pi05" in words:
        model = pi05_state(env.state_dim)
    elif task == ALL:  # The instruction says which task it is.
        model = openvla_state(env.state_dim, label_width=LABEL_WIDTH)
    else:
        sizes = {"hidden_dims": (192, 192, 192), "value_dims": (128, 64), "label_width": LABEL_WIDTH}
        model = MLPConfig(env.state_dim, env.action_dim, num_bins=256, **sizes)
    name = "_".join([name, task, method, *(["pi05"] if "pi05" in words else [])])
    config = base_config(env, model, name=name)
    set_method(config, method)
    demos_with_recoveries(config)
    config.demos.num_demos = 500
    imitation_on_cpu(config, num_steps=3000)
    preference_on_cpu(config)
    interaction_on_cpu(config)
    config.ppo.num_iterations = 70
    config.evaluation.temperature = 0.0
    config.evaluation.num_videos = 0
    config.ppo.validation.every = 5
    return config
