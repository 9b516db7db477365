"""Decides, on toys, which way of using stages makes PPO learn faster, from which start, and by how much.

All of this was written down before the runs.

**Tasks.** A toy of each family of stages (`envs.toys`: push, place, lift), steps of 15 or 8 mm, and a start: random
weights ("0"), or an imitation of the expert that succeeds in about 10, 30 or 60 % of sampled episodes. `push-8mm-30` is
one of the 24 tasks.

**Arms.** PPO with an episode's end terminated or bootstrapped; shaping with the paper's or the progressive potentials,
ended with "zero" or "keep", terminated or bootstrapped; and controls: `critic_plus_potential`, PPO with the critic
V + Phi, which must coincide with progressive, zero, terminate; `larger_reward`, PPO whose reward is 1 + gamma; `dense`,
the distance that remains, not differenced; `rl4vla`, its reward (tasks with a grasp). Added when the others had been
measured on three tasks, and these on none: `ppo_jump_start` and `progressive_jump_start`, half of whose episodes the
expert begins (`ppo.jump_start`; its steps count, the success of its episodes does not), and
`progressive_whiten_by_stage`; the shaping of both is progressive, keep, terminate.

**Metrics.** Success of an iteration is the share of successes among its 64 sampled episodes. The *area* is the mean of
it over all 50 iterations. *Steps to 90 %* are environment steps until the mean of three iterations in a row is at least
0.9, those three included; infinity where that never happens.

**Tuning.** 32 random draws of settings, the same for every arm and task, each with tuning seeds 0 to 2. An arm's best
draw on a task has the largest mean area, its median draw the 16th largest. Both then run with 30 fresh seeds, 1000 to
1029, the same for every arm; only these are reported.

**Statistics.** Interquartile means over the fresh seeds, 95 % bootstrap intervals, differences and ratios paired by
seed and stratified by task. An arm beats PPO where the interval of the difference of areas to the better PPO (of both
ends, each at its own best draw) is above 0. It is twice as fast where the ratio of its steps to 90 % to those is at
most 0.5 and the upper limit below 0.75. `critic_plus_potential` and progressive, zero, terminate agree where the
interval of their difference of areas holds 0.

**Expected**, from theory: progressive, keep, terminate is the best; the gain is the larger the weaker the start is, and
none at 60 %; progressive, zero, terminate is like PPO; progressive, zero, bootstrap ends near 0 %.

    python benchmarks/shaping.py --out runs/shaping --print                    # cells that are left
    python benchmarks/shaping.py --out runs/shaping --minutes 60               # runs them, the cheapest tasks first
    python benchmarks/shaping.py --out runs/shaping --tasks push-8mm-0 --blocks 4
    python benchmarks/shaping.py --out runs/shaping --report results/shaping   # table, CSV, picture of what there is
    python benchmarks/shaping.py --out runs/shaping --calibrate                # success of imitations by their length

A task takes about an hour on one core. Results are appended to a file, and what is there is not run again.
"""

import argparse
import functools
import time
from typing import NamedTuple

import jax
import numpy as np
from cells import Cell, Row, Settings, read_rows, run_task
from shaping_report import write_report
from toy_learning import Arm, Hyper, make_training
from toy_tasks import TASKS, Task, calibrate, run_rows

from stare_jax.config import home_path
from stare_jax.envs.toys import TOYS

FILE = "shaping.jsonl"
SETTINGS = Settings(num_blocks=8)
ARMS = {
    "ppo_terminate": Arm(shaping=False),
    "ppo_bootstrap": Arm(shaping=False, time_limit="bootstrap"),
    "progressive_keep_terminate": Arm(),
    "paper_keep_terminate": Arm(progressive=False),
    "progressive_zero_terminate": Arm(terminal_potential="zero"),
    "paper_zero_terminate": Arm(progressive=False, terminal_potential="zero"),
    "progressive_keep_bootstrap": Arm(time_limit="bootstrap"),
    "paper_keep_bootstrap": Arm(progressive=False, time_limit="bootstrap"),
    "progressive_zero_bootstrap": Arm(terminal_potential="zero", time_limit="bootstrap"),
    "paper_zero_bootstrap": Arm(progressive=False, terminal_potential="zero", time_limit="bootstrap"),
    "critic_plus_potential": Arm(shaping=False, has_potential_in_critic=True),
    "larger_reward": Arm(shaping=False, is_reward_larger=True),
    "dense": Arm(shaping=False, reward="dense"),
    "rl4vla": Arm(shaping=False, reward="rl4vla"),
    "ppo_jump_start": Arm(shaping=False, jump_start=0.5),
    "progressive_jump_start": Arm(jump_start=0.5),
    "progressive_whiten_by_stage": Arm(whiten_by_stage=True),
}


class Size(NamedTuple):
    """Length of a run."""

    iterations: int = 50
    episodes: int = 64


def arms_of(task: Task) -> list[str]:
    """Returns the arms of a task: RL4VLA's reward pays for a grasp."""
    return [name for name, arm in ARMS.items() if arm.reward != "rl4vla" or "grasp" in TOYS[task.toy].spec.stage_names]


@functools.cache
def draw_settings(num_draws: int, *, per_block: int) -> tuple[Hyper, ...]:
    """Draws the settings that every arm is tuned over; more draws begin with the same ones."""
    rng = np.random.default_rng(20240)
    draws = []
    for i in range(num_draws):
        rate = float(np.exp(rng.uniform(np.log(5e-4), np.log(1e-2))))
        draws.append(
            Hyper(
                learning_rate=rate,
                value_learning_rate=rate * float(np.exp(rng.uniform(0.0, np.log(8.0)))),
                gae_lambda=float(rng.choice([0.8, 0.95, 1.0])),
                gamma=float(rng.choice([0.95, 0.99, 1.0])),
                entropy_coef=float(rng.choice([0.0, 1e-3, 1e-2])),
                num_epochs=(4, 2, 8, 1)[i // per_block % 4],
            )
        )
    return tuple(draws)


@functools.cache
def _training(toy: str, size: Size):
    arms = [ARMS[arm] for arm in arms_of(Task(toy, 0, 0))]
    return make_training(TOYS[toy], arms, num_iterations=size.iterations, num_episodes=size.episodes)


def measure(cell: Cell, *, per_block: int = SETTINGS.draws_per_block) -> Row:
    """Trains an arm with each draw and each seed of a cell; rows of the result are draws, then seeds."""
    task, draws, seeds = TASKS[cell["task"]], cell["draws"], cell["seeds"]
    chosen = [draw_settings(max(draws) + 1, per_block=per_block)[draw] for draw in draws]
    train = _training(task.toy, Size(cell["iterations"], cell["episodes"]))
    arm = np.int32(arms_of(task).index(cell["arm"]))
    curve = run_rows(lambda params, keys, hyper: train(params, keys, arm, hyper, task.max_step), task, seeds, chosen)
    return {
        "success": np.round(curve.success.astype(float), 4).tolist(),
        "steps": curve.steps.tolist(),
        "completed": np.round(curve.completed[:, -1].astype(float), 3).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=home_path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that a task has", metavar="ARM")
    parser.add_argument("--blocks", type=int, default=SETTINGS.num_blocks, help="blocks of four draws to tune with")
    parser.add_argument("--minutes", type=float, help="begin no cell after this time")
    parser.add_argument("--print", action="store_true", help="print the cells that are left, and run none")
    parser.add_argument("--report", type=home_path, help="write table, CSV and picture into this folder")
    parser.add_argument("--calibrate", action="store_true", help="print the success of imitations by their length")
    args = parser.parse_args()
    tasks, settings, size = [TASKS[name] for name in args.tasks], SETTINGS._replace(num_blocks=args.blocks), Size()
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    if args.calibrate:
        return calibrate(tasks)
    arms = {task: [arm for arm in arms_of(task) if args.arms is None or arm in args.arms] for task in tasks}
    if args.report:
        return write_report(read_rows(args.out / FILE), args.report, arms, settings, size._asdict())
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    for task in tasks:
        run_task(
            task.name,
            arms[task],
            measure,
            args.out / FILE,
            settings,
            size=size._asdict(),
            only_print=args.print,
            deadline=deadline,
        )


if __name__ == "__main__":
    main()
