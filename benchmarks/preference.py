"""Decides, on toys, which preference loss makes the most of pairs of a policy's own episodes.

All of this was written down before the runs.

**Tasks.** Those of `benchmarks/shaping.py` that start from an imitation of about 10, 30 or 60 %: `place-15mm-30` is one
of 18. Pairs are the best and the worst of four sampled episodes from each of 256 starts.

**Arms.** `tpo` on whole trajectories (GRAPE); `sta_tpo` stage by stage with each use of the costs (paper, offset,
relabel) and each norm (K, valid); and the control `imitation`, more imitation of the chosen episodes alone.

**Metric.** The *gain*: the share of successes among 1024 sampled episodes after the phase, less that before, on the
same starts.

**Tuning.** 16 random draws of learning rate, beta, weight of the costs and epochs, the same for every arm and task,
each with tuning seeds 0 to 2. An arm's best draw on a task has the largest mean success, its median draw the 8th
largest. Both run with 30 fresh seeds, 1000 to 1029; only these are reported. The control has a learning rate and epochs
alone, so its draws differ in less.

**Statistics.** Interquartile means over the fresh seeds with 95 % bootstrap intervals; gains less that of `tpo` and of
`imitation` are paired by seed. Stages help where the first is above 0; preferences help where the second is.

**Expected**: the margin of the paper gives the smaller weight to the stage that was clearly better, so offset and
relabel are ahead of it; all of them are ahead of the control where there are many pairs of a success and a failure.

    python benchmarks/preference.py --out runs/preference --minutes 30
    python benchmarks/preference.py --out runs/preference --report results/preference
"""

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from cells import Cell, Result, Row, Settings, read_results, read_rows, run_task
from cells_report import compare, difference, estimate, markdown, show
from toy_preference import Arm, Hyper, make_preference
from toy_tasks import TASKS, Task, run_rows

from stare_jax.config import home_path
from stare_jax.envs.toys import TOYS
from stare_jax.evaluate.bootstrap import interquartile_mean
from stare_jax.logging import say

FILE = "preference.jsonl"
SETTINGS = Settings(num_blocks=4)
ARMS = {
    "tpo": Arm("tpo"),
    "imitation": Arm("imitation"),
    **{
        f"sta_tpo_{margin}_{norm}": Arm("sta_tpo", margin, norm)
        for margin in ("paper", "offset", "relabel")
        for norm in ("K", "valid")
    },
}


class Size(NamedTuple):
    """Length of a run."""

    starts: int = 256
    batch: int = 32
    evaluated: int = 1024


@functools.cache
def draw_settings(num_draws: int, *, per_block: int) -> tuple[Hyper, ...]:
    """Draws the settings that every arm is tuned over; more draws begin with the same ones."""
    rng = np.random.default_rng(20241)

    def log_uniform(low, high):
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    return tuple(
        Hyper(
            learning_rate=log_uniform(1e-4, 5e-3),
            beta=log_uniform(0.3, 30.0),
            cost_coef=log_uniform(1.0, 100.0),
            num_epochs=(4, 8, 2, 16)[i // per_block % 4],
        )
        for i in range(num_draws)
    )


@functools.cache
def _phase(toy: str, size: Size):
    return make_preference(
        TOYS[toy],
        list(ARMS.values()),
        num_starts=size.starts,
        batch_size=size.batch,
        num_evaluated=size.evaluated,
    )


def measure(cell: Cell, *, per_block: int = SETTINGS.draws_per_block) -> Row:
    """Trains an arm with each draw and each seed of a cell; rows of the result are draws, then seeds."""
    task, draws, seeds = TASKS[cell["task"]], cell["draws"], cell["seeds"]
    chosen = [draw_settings(max(draws) + 1, per_block=per_block)[draw] for draw in draws]
    phase = _phase(task.toy, Size(cell["starts"], cell["batch"], cell["evaluated"]))
    arm = np.int32(list(ARMS).index(cell["arm"]))
    outcome = run_rows(lambda params, keys, hyper: phase(params, keys, arm, hyper, task.max_step), task, seeds, chosen)
    return {
        "before": np.round(outcome.before.astype(float), 4).tolist(),
        "success": np.round(outcome.success.astype(float), 4).tolist(),
        "num_pairs": outcome.num_pairs.tolist(),
        "completed": np.round(outcome.completed.astype(float), 3).tolist(),
    }


# ---- Report ---------------------------------------------------------------------------------------------------------
HEADER = ("arm", "success after", "gain", "gain less TPO's", "gain less imitation's", "gain, median draw")


def gain(row: Row) -> np.ndarray:
    """Returns success after less success before, `[S]`."""
    return np.subtract(row["success"], row["before"])


def task_table(results: Mapping[str, Result]) -> list[list[str]]:
    """Returns the rows of the table of a task, the largest gain first."""
    table = []
    for name, result in sorted(results.items(), key=lambda item: -interquartile_mean(gain(item[1].best))):
        line = [
            name,
            show(estimate(np.array(result.best["success"])), ".3f"),
            show(estimate(gain(result.best)), "+.3f"),
        ]
        for reference in ("tpo", "imitation"):
            is_compared = reference in results and name != reference
            pairs = [(gain(result.best), gain(results[reference].best))] if is_compared else []
            line.append(show(compare(pairs, difference), "+.3f") if pairs else "–")
        table.append([*line, "–" if result.median is None else show(estimate(gain(result.median)), "+.3f")])
    return table


def write_report(rows: Sequence[Row], out: Path, tasks: Sequence[Task], settings: Settings, size: Size) -> None:
    """Writes `table.md` of the tasks that have been run."""
    text = ""
    for task in tasks:
        results = read_results(rows, task.name, list(ARMS), settings, size._asdict())
        if not results:
            continue
        row = next(iter(results.values())).best
        text += f"## {task.name}\n\n{np.mean(row['before']):.1%} before, {np.mean(row['num_pairs']):.0f} pairs of "
        text += f"{size.starts} starts, {settings.num_fresh_seeds} fresh seeds.\n\n"
        text += markdown(HEADER, task_table(results)) + "\n"
    if not text:
        return say("no task has runs with fresh seeds yet")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text, "utf-8")
    say(f"{out / 'table.md'} is written")


def main() -> None:
    tasks = [name for name, task in TASKS.items() if task.start]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=home_path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK")
    parser.add_argument("--blocks", type=int, default=SETTINGS.num_blocks, help="blocks of four draws to tune with")
    parser.add_argument("--minutes", type=float, help="begin no cell after this time")
    parser.add_argument("--print", action="store_true", help="print the cells that are left, and run none")
    parser.add_argument("--report", type=home_path, help="write the table into this folder")
    args = parser.parse_args()
    settings, size, path = SETTINGS._replace(num_blocks=args.blocks), Size(), args.out / FILE
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    if args.report:
        return write_report(read_rows(path), args.report, [TASKS[name] for name in args.tasks], settings, size)
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    options = {"size": size._asdict(), "only_print": args.print, "deadline": deadline}
    for task in args.tasks:
        run_task(task, list(ARMS), measure, path, settings, **options)


if __name__ == "__main__":
    main()
