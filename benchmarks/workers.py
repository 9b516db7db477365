"""Measures environment steps per second of whole PPO iterations with different numbers of simulators.

The policy sees the low-dimensional state, and in all rows but one the instruction; nothing is rendered. Each row starts
its own processes and runs a few iterations of PPO: whole episodes, annotation, epochs of updates. The first iteration
compiles and does not count.

A second table compares the simulators' time for the same episodes of the expert, which end at success, when idle
environments rest and when they are stepped and drawn on; the two take turns.

    python benchmarks/workers.py --json benchmarks/results/workers_cpu.json
    python benchmarks/workers.py --layouts 16x1 16x8        # processes x environments of each
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.data.demos import expert_act
from stare_jax.envs import EnvConfig, make_expert, make_vec_env
from stare_jax.envs.experts.base import execution_noise
from stare_jax.logging import Clock
from stare_jax.models import make_policy, openvla_state
from stare_jax.models.normalize import identity_stats
from stare_jax.rollout.collect import collect_episodes
from stare_jax.stages import get_task
from stare_jax.train.loop import Run
from stare_jax.train.ppo import PPOConfig, train_ppo
from stare_jax.types import NormStats

IDLE = (("PushCube-v1", 0), ("PushCube-v1", 64), ("StackCube-v1", 0))
LAYOUTS = ("1x1", "2x1", "4x1", "8x1", "1x16", "2x2", "2x4", "2x8", "2x16", "2x32", "4x8")
TASKS = ("PullCube-v1", "StackCube-v1", "LiftPegUpright-v1")
PPO = PPOConfig(num_episodes=128, num_epochs=4, minibatch_size=512, time_limit="terminate", checkpoint_every=1000)
AREAS = {"env": "simulator", "policy": "policy", "update": "update", "other": "other"}
STILL_FROM = {"PushCube-v1": 3, "PullCube-v1": 3}
"""the first action dimension in which demonstrations stay still: rotation and gripper, where a cube is pushed"""


def action_statistics(env_id: str, state_dim: int) -> NormStats:
    """Returns statistics under which the policy decides the action dimensions that its task needs."""
    stats, first = identity_stats(7, state_dim), STILL_FROM.get(env_id, 7)
    stats.action_q99[first:] = stats.action_q01[first:]
    return stats


def measure(env_id: str, workers: int, envs: int, iterations: int, *, prompt: bool = True) -> dict[str, float]:
    """Returns the median rate of the iterations, and where their time went, as fractions."""
    config = EnvConfig(env_id, num_workers=workers, envs_per_worker=envs, image_size=0, use_state="low_dim")
    stats = action_statistics(env_id, config.state_dim)
    changes = {} if prompt else {"prompt_template": "", "prompt_length": 3}
    policy = make_policy(openvla_state(config.state_dim, **changes), stats)
    params = jax.jit(policy.init)(jax.random.key(0))
    lines = []
    with contextlib.closing(make_vec_env(config)) as env, tempfile.TemporaryDirectory() as directory:
        run = Run(Path(directory), stats, writer=lambda step, metrics, *, phase: lines.append(metrics))
        ppo = dataclasses.replace(PPO, num_iterations=1 + iterations)
        train_ppo(policy, params, env, get_task(env_id), ppo, run)
    seconds = {area: sum(line[f"time/{area}_s"] for line in lines[1:]) for area in AREAS}
    total = sum(seconds.values())
    return {
        "env_id": env_id,
        "processes": workers,
        "envs_per_process": envs,
        "prompt": prompt,
        "env_steps_per_s": statistics.median(line["perf/env_steps_per_s"] for line in lines[1:]),
        "env_steps_per_iteration": float(np.mean(np.diff([line["env/steps"] for line in lines]))),
        "epochs": float(np.mean([line["ppo/epochs"] for line in lines[1:]])),
        **{f"{area}_fraction": seconds[area] / total for area in AREAS},
    }


class SteppingAll:
    """`VecEnv` that steps and draws environments which have nothing to do, too."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name):
        return getattr(self._env, name)

    def send(self, action, reset_seeds=None, **options):
        self._env.send(action, reset_seeds, **options | {"is_idle": None})


def measure_idle(env_id: str, image_size: int, repeats: int) -> dict[str, float]:
    """Returns the simulators' seconds for 96 episodes in 16 environments of one process, with idle ones at rest or not.

    The expert is disturbed, so that some episodes are long; which are under way when decides how many rest.
    """
    config = EnvConfig(env_id, num_workers=1, image_size=image_size, envs_per_worker=16, use_state="low_dim")
    expert, seeds = make_expert(env_id), range(96)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with contextlib.closing(make_vec_env(config)) as env:
        for _ in range(1 + repeats):
            for rests in (False, True):
                clock = Clock()
                rollout = collect_episodes(
                    env if rests else SteppingAll(env),
                    expert_act(expert),
                    seeds,
                    stop_at_success=True,
                    perturb=execution_noise(seeds, [0.5] * len(seeds), expert.action_scale),
                    clock=clock,
                )
                seconds[rests].append(clock.seconds()["env"])
    stepped, rested = (statistics.median(values[1:]) for values in seconds.values())
    return {
        "env_id": env_id,
        "image_size": image_size,
        "env_steps": rollout.num_steps,
        "stepped_s": stepped,
        "rested_s": rested,
        "ratio": stepped / rested,
    }


def print_idle_table(rows: list[dict]) -> None:
    print(f"\n{'task':<20}{'image':>6}{'steps':>7}{'stepped, s':>12}{'rested, s':>11}{'ratio':>7}")
    for row in rows:
        print(f"{row['env_id']:<20}{row['image_size']:>6}{row['env_steps']:>7}", end="")
        print(f"{row['stepped_s']:>12.2f}{row['rested_s']:>11.2f}{row['ratio']:>7.2f}")


def print_table(rows: list[dict]) -> None:
    header = f"{'task':<20}{'processes':>10}{'x envs':>8}{'prompt':>8}{'steps/s':>10}{'ratio':>8}"
    print(f"\n{header}" + "".join(f"{name:>11}" for name in AREAS.values()))
    for row in rows:
        shares = "".join(f"{100 * row[f'{area}_fraction']:>9.0f} %" for area in AREAS)
        layout = f"{row['env_id']:<20}{row['processes']:>10}{row['envs_per_process']:>8}"
        layout += f"{'yes' if row['prompt'] else 'no':>8}"
        print(f"{layout}{row['env_steps_per_s']:>10.0f}{row['ratio_to_first']:>8.2f}{shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="PxE", help=f"({' '.join(LAYOUTS)})")
    parser.add_argument("--iterations", type=int, default=3, help="that count, after one that compiles (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    idle = [measure_idle(*case, args.iterations) for case in IDLE]
    layouts = [tuple(int(part) for part in layout.split("x")) for layout in args.layouts]
    best, rows = (0.0, layouts[0]), []
    for workers, envs in layouts:
        rows.append(measure("PushCube-v1", workers, envs, args.iterations))
        best = max(best, (rows[-1]["env_steps_per_s"], (workers, envs)))
    rows.append(measure("PushCube-v1", *best[1], args.iterations, prompt=False))
    rows += [measure(task, *best[1], args.iterations) for task in TASKS]
    for row in rows:
        row["ratio_to_first"] = row["env_steps_per_s"] / rows[0]["env_steps_per_s"]
    print_table(rows)
    print_idle_table(idle)
    if args.json:
        load = [round(x, 2) for x in os.getloadavg()]
        machine = {"cores": os.cpu_count(), "load_average": load, "jax": jax.__version__}
        command = f"python benchmarks/workers.py --iterations {args.iterations} --layouts {' '.join(args.layouts)}"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"command": command, "machine": machine, "rows": rows, "idle": idle}, indent=2) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
