"""Measures the experts: success, steps, stages and saturation of every task, within the horizon of the task.

The Panda's episodes begin at fresh seeds. The WidowX tasks have few official starts, of which all are used, and as many
jittered ones, with which demonstrations begin. Where an object is placed, the expert goes on after success: `kept` is
the share of the episodes in which it has let go of the object and the task is still solved a second later.

    python benchmarks/experts.py --json benchmarks/results/experts.json
    python benchmarks/experts.py --tasks StackCube-v1 --episodes 20 --limit 0.5
"""

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.envs import EnvConfig, make_expert
from stare_jax.envs.maniskill.scenes import SCENES
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.seeds import DEMO_SEEDS, EVALUATION_SEEDS
from stare_jax.evaluate.intervals import wilson_interval
from stare_jax.stages import TASKS, get_task, separate
from stare_jax.types import Signals

FRESH_SEEDS = DEMO_SEEDS + 60_000_000
"""Seeds in the region of demonstrations that no run uses; nothing was tuned on them."""
SATURATED = 0.98
"""Fraction of the range of an action's translation from which on the action counts as saturated."""


def run_episode(simulator: Simulator, expert: Any, seed: int) -> tuple[list[Signals], list[np.ndarray], bool | None]:
    """Returns the states up to success or the horizon, the actions, and whether success was kept; None if not asked."""
    signals, memory, actions = [simulator.reset(seed, reproducible=True).signals], expert.init(), []

    def act() -> Signals:
        nonlocal memory
        action, memory = expert.act(signals[-1], memory)
        actions.append(action)
        return simulator.step(action).signals

    horizon = simulator.config.horizon
    while len(actions) < horizon and not signals[-1].success:
        signals.append(act())
    episode, num_actions = list(signals), len(actions)
    if get_task(simulator.config.env_id).family != "pick-place":
        return episode, actions, None
    while len(actions) < horizon and not (signals[-1].success and not signals[-1].is_grasped):
        signals.append(act())
    for _ in range(round(simulator.env.control_freq)):
        signals.append(act())
    return episode, actions[:num_actions], bool(signals[-1].success and not signals[-1].is_grasped)


def stage_lengths(env_id: str, episodes: list[list[Signals]], horizon: int) -> np.ndarray:
    """Returns the number of actions taken in each stage, `[episodes, K]`."""
    spec = get_task(env_id)
    label = jax.jit(lambda signals, valid: separate(spec, signals, valid).stage_t)
    lengths = []
    for signals in episodes:
        padded = signals + [signals[-1]] * (horizon + 1 - len(signals))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
        stage_t = np.asarray(label(stacked, np.arange(horizon + 1) < len(signals)))[: len(signals) - 1]
        lengths.append(np.bincount(stage_t, minlength=spec.num_stages))
    return np.array(lengths)


def measure(job: tuple[str, str, list[int], float]) -> dict[str, Any]:
    """Returns a row of the table."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # ManiSkill's own
    env_id, starts, seeds, limit = job
    config = EnvConfig(env_id, image_size=0)
    simulator, expert = Simulator(config), make_expert(env_id, limit=limit)
    episodes, steps, saturated, kept, failed = [], [], [], [], []
    for seed in seeds:
        signals, actions, is_kept = run_episode(simulator, expert, seed)
        episodes.append(signals)
        translation = np.abs(np.stack(actions)[:, :3]).max(axis=1)
        saturated.append(np.mean(translation > SATURATED * expert.action_scale[0]))
        kept.append(is_kept)
        (steps if signals[-1].success else failed).append(len(actions) if signals[-1].success else seed)
    simulator.close()
    row = {"env_id": env_id, "starts": starts, "horizon": config.horizon, "episodes": len(seeds)}
    row |= {"success": list(wilson_interval(len(steps), len(seeds))), "failed_seeds": failed}
    row |= {"steps_mean": float(np.mean(steps)), "steps_max": int(max(steps)), "saturated": float(np.mean(saturated))}
    row["kept"] = None if None in kept else float(np.mean(kept))
    lengths = stage_lengths(env_id, episodes, config.horizon).mean(axis=0)
    row["stages"] = dict(zip(get_task(env_id).stage_names, map(float, lengths), strict=True))
    return row


def jobs(tasks: Iterable[str], num_episodes: int, limit: float) -> list[tuple[str, str, list[int], float]]:
    chosen = []
    for env_id in tasks:
        fresh = list(range(FRESH_SEEDS, FRESH_SEEDS + num_episodes))
        if num_starts := SCENES[env_id].num_starts:
            official = list(range(EVALUATION_SEEDS, EVALUATION_SEEDS + num_starts))
            chosen.append((env_id, "official", official, limit))
        chosen.append((env_id, "jittered" if num_starts else "fresh", fresh, limit))
    return chosen


def print_row(row: dict) -> None:
    rate, low, high = (100 * value for value in row["success"])
    kept = "" if row["kept"] is None else f"{100 * row['kept']:.1f}"
    print(f"{row['env_id']:<46}{row['starts']:<10}{row['episodes']:>5}", end="")
    print(f"{rate:>8.1f} [{low:.1f}, {high:.1f}]".ljust(24) + f"{row['steps_mean']:>6.1f}{row['steps_max']:>5}", end="")
    print(f"{kept:>7}{100 * row['saturated']:>6.0f}", end="   ")
    print(", ".join(f"{name} {length:.1f}" for name, length in row["stages"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="ENV_ID", help="(all)")
    parser.add_argument("--episodes", type=int, default=100, help="that are not from official starts (%(default)s)")
    parser.add_argument("--limit", type=float, default=1.0, help="of the experts' translations, as a fraction (1)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="tasks at once (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    heading = f"{'task':<46}{'starts':<10}{'n':>5}{'success, %':>12}{'':<12}{'mean':>6}{'max':>5}{'kept':>7}{'sat.':>6}"
    print(f"{heading}   stages")
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap(measure, jobs(args.tasks, args.episodes, args.limit)):
            print_row(row)
            rows.append(row)
    if args.json:
        command = f"python benchmarks/experts.py --episodes {args.episodes} --limit {args.limit:g}"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
