"""Draws what the stage separator makes of an episode of a task's expert: frames, stages, potentials, shaped reward.

    python launch/show_stages.py --task=PushCube-v1 --out=figures
    python launch/show_stages.py --task=all --out=docs/stages --seed=1

Writes OUT/<task>.png and OUT/<task>_dark.png, and prints how long each stage lasted and what it cost.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import command
import jax
import numpy as np

from stare_jax.config import user_input
from stare_jax.data.demos import expert_act
from stare_jax.envs import EnvConfig, make_expert, make_vec_env
from stare_jax.logging import print_table, say
from stare_jax.report.figures import draw_timeline
from stare_jax.report.timeline import trace_episode
from stare_jax.report.video import telling_steps
from stare_jax.rollout.collect import collect_episodes
from stare_jax.runs.evaluation import training_rewards
from stare_jax.stages import TASKS, separate, stage_costs, stage_mask
from stare_jax.train.ppo import PPOConfig
from stare_jax.types import Trajectory

NUM_FRAMES = 6


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    tasks = f"all, one of {', '.join(TASKS)}, or a task of your own: a Python file or a module"
    add("--task", required=True, metavar="TASK", help=tasks)
    add("--out", type=command.path, required=True, metavar="FOLDER", help="where the figures go")
    add("--seed", type=command.natural, default=0, help="of the episode (default: 0)")
    add("--image-size", type=command.count, default=192, metavar="PIXELS", help="height of the frames (default: 192)")
    return parser.parse_args(argv)


def expert_episode(config: EnvConfig, seed: int) -> Trajectory:
    """Returns an episode of the task's expert up to its success, leaves `[T, ...]`."""
    act = expert_act(make_expert(config.task_name))
    with contextlib.closing(make_vec_env(config)) as simulator:
        rollout = collect_episodes(simulator, act, [seed], stop_at_success=True, reproducible=True)
    return jax.tree.map(lambda leaf: leaf[0], rollout.trajectory)


def show_stages(task: str, out: Path, seed: int, image_size: int) -> None:
    """Draws the figure of one task and prints its table."""
    with user_input():
        config = EnvConfig(task=task, num_workers=1, envs_per_worker=1, image_size=image_size)
    # The WidowX camera's images are wider than high.
    native_height, native_width = config.scene.camera.size
    config = dataclasses.replace(config, image_width=image_size * native_width // native_height)
    episode, spec, env_id = expert_episode(config, seed), config.spec, config.env_id
    timeline = trace_episode(spec, episode.signals, episode.valid, training_rewards(spec, PPOConfig()))
    frames = next(iter(episode.observation.images.values()))
    shown = {t: frames[t] for t in telling_steps(timeline, NUM_FRAMES)}
    path = out / f"{env_id}.png"
    title = f"{env_id}  “{spec.instruction}”  expert, seed {seed}"
    draw_timeline(timeline, spec.stage_names, path, title=title, frames=shown)

    separation = separate(spec, episode.signals, episode.valid)
    costs = np.asarray(stage_costs(spec, episode.signals, separation, episode.valid))
    lengths = np.asarray(stage_mask(separation, spec.num_stages, episode.valid)).sum(axis=1)
    rows = [
        (name, int(length), f"{cost:.4f}") for name, length, cost in zip(spec.stage_names, lengths, costs, strict=True)
    ]
    outcome = "success" if timeline.success_t.any() else "no success"
    print_table([f"{env_id}: {outcome} after {len(timeline.reward_t)} actions", "states", "cost"], rows)
    say(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    tasks = TASKS if arguments.task == "all" else (arguments.task,)

    def show() -> None:
        for task in tasks:
            show_stages(task, arguments.out, arguments.seed, arguments.image_size)

    return command.run(show, after_stop="figures that were finished are there")


if __name__ == "__main__":
    sys.exit(main())
