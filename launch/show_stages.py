"""Draws what the stage separator makes of an episode of a task's expert: frames, stages, potentials, shaped reward.

    python launch/show_stages.py --task=PushCube-v1 --out=figures
    python launch/show_stages.py --task=all --out=docs/stages --seed=1

Writes OUT/<task>.png and OUT/<task>_dark.png, and prints how long each stage lasted and what it cost.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from stare_jax.data.demos import expert_act
from stare_jax.envs import EnvConfig, SimulatorError, make_expert, make_vec_env
from stare_jax.logging import print_table, say
from stare_jax.report.figures import draw_timeline
from stare_jax.report.timeline import trace_episode
from stare_jax.report.video import telling_steps
from stare_jax.rollout.collect import collect_episodes
from stare_jax.runs.evaluation import training_rewards
from stare_jax.stages import TASKS, get_task, separate, stage_costs, stage_mask
from stare_jax.train.ppo import PPOConfig
from stare_jax.types import Trajectory

NUM_FRAMES = 6


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=("all", *TASKS), required=True, metavar="ENV_ID", help=f"all, or one of {', '.join(TASKS)}")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the figures go")
    add("--seed", type=int, default=0, help="of the episode (default: 0)")
    add("--image-size", type=int, default=192, metavar="PIXELS", help="height of the frames (default: 192)")
    return parser.parse_args(argv)


def expert_episode(config: EnvConfig, seed: int) -> Trajectory:
    """Returns an episode of the task's expert up to its success, leaves `[T, ...]`."""
    with contextlib.closing(make_vec_env(config)) as simulator:
        act = expert_act(make_expert(config.env_id))
        rollout = collect_episodes(simulator, act, [seed], stop_at_success=True, reproducible=True)
    return jax.tree.map(lambda leaf: leaf[0], rollout.trajectory)


def show_stages(env_id: str, out: Path, seed: int, image_size: int) -> None:
    """Draws the figure of one task and prints its table."""
    # The WidowX camera's images are wider than high.
    native_height, native_width = EnvConfig(env_id).scene.camera.size
    width = image_size * native_width // native_height
    config = EnvConfig(env_id, num_workers=1, envs_per_worker=1, image_size=image_size, image_width=width)
    episode, spec = expert_episode(config, seed), get_task(env_id)
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
    try:
        for env_id in TASKS if arguments.task == "all" else (arguments.task,):
            show_stages(env_id, arguments.out, arguments.seed, arguments.image_size)
    except SimulatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
