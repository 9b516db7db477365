"""The paper's four Franka tasks from the low-dimensional state, at a size for one CPU core a run.

    python launch/train.py --config=configs/franka_state.py                         STA-PPO on StackCube
    python launch/train.py --config=configs/franka_state.py:LiftPegUpright-v1,ppo   any task, any of `methods.METHODS`
    python launch/train.py --config=configs/franka_state.py:StackCube-v1,ipi,pi05   with pi0.5
    python launch/train.py --config=configs/franka_state.py:all,ipi                 one policy for all four tasks
    python launch/study.py --study=configs/studies/franka_state.py                  the methods side by side

One set of numbers for all tasks and methods. A policy of a tenth of a million parameters imitates some hundred
demonstrations with noise, then learns from about two hundred thousand steps, sampled at the temperature below; it is
judged by the means of its action distributions on 300 episodes.
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
from stare_jax.models import openvla_state, pi05_state

TASKS = ("StackCube-v1", "LiftPegUpright-v1", "PushCube-v1", "PullCube-v1")
ALL = "all"


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
    elif task == ALL:
        model = openvla_state(env.state_dim, label_width=4.0)
    else:  # Of one task: the instruction is the same in every row, and took half of the tokens.
        model = openvla_state(env.state_dim, label_width=4.0, prompt_template="", prompt_length=3)
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
    if "pi05" not in words:
        config.ppo.temperature = 0.4
    return config
