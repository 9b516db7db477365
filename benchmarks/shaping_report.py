"""Table, CSV and picture of `benchmarks/shaping.py`, from whatever part of it has run."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from cells import FIRST_FRESH_SEED, Result, Row, Settings, read_results, tuned_scores
from cells_report import compare, difference, estimate, markdown, ratio, show
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from toy_tasks import STARTS, Task

from stare_jax.evaluate.bootstrap import interquartile_mean
from stare_jax.logging import say
from stare_jax.report.figures import PALETTE, save_figure, style_axis

TARGET, WINDOW = 0.9, 3
PPO = ("ppo_terminate", "ppo_bootstrap")
DRAWN = (
    *PPO,
    "progressive_keep_terminate",
    "paper_keep_terminate",
    "progressive_zero_terminate",
    "rl4vla",
    "ppo_jump_start",
)
"""Arms of the picture, a colour each."""
HEADER = ("arm", "area, best draw", "steps to 90 %", "area less PPO's", "steps / PPO's", "area, median draw")

Results = Mapping[Task, Mapping[str, Result]]


def area(row: Row) -> np.ndarray:
    """Returns the mean success of all iterations, `[S]`."""
    return np.mean(row["success"], axis=1)


def steps_to_target(row: Row) -> np.ndarray:
    """Returns the environment steps until the mean success of `WINDOW` iterations in a row is at the target, `[S]`;
    infinity where it never is."""
    return np.array([_steps_of_run(*run) for run in zip(row["success"], row["steps"], strict=True)])


def _steps_of_run(success: Sequence[float], steps: Sequence[int]) -> float:
    means = np.convolve(success, np.ones(WINDOW) / WINDOW, "valid")
    # Success is stored with four decimals; the mean of three must not miss the target by their rounding.
    reached = np.flatnonzero(means >= TARGET - 1e-4)
    return float(steps[reached[0] + WINDOW - 1]) if len(reached) else math.inf


def better_ppo(results: Mapping[str, Result]) -> str | None:
    """Returns the PPO arm with the larger area in tuning; None before both have run."""
    return max(PPO, key=lambda arm: results[arm].score) if set(PPO) <= set(results) else None


# ---- Tables ---------------------------------------------------------------------------------------------------------
def task_table(results: Mapping[str, Result]) -> list[list[str]]:
    """Returns the rows of the table of a task, the largest area first."""
    reference = better_ppo(results)
    table = []
    for name, result in sorted(results.items(), key=lambda item: -interquartile_mean(area(item[1].best))):
        steps = steps_to_target(result.best)
        line = [name, show(estimate(area(result.best)), ".3f"), show(estimate(steps / 1000), ".0f", " k")]
        if reference is None or name == reference:
            line += ["the reference" if name == reference else "–", "–"]
        else:
            ppo = results[reference].best
            line.append(show(compare([(area(result.best), area(ppo))], difference), "+.3f"))
            line.append(show(compare([(steps, steps_to_target(ppo))], ratio), ".2f"))
        table.append([*line, "–" if result.median is None else show(estimate(area(result.median)), ".3f")])
    return table


def pooled_table(by_task: Results) -> list[list[str]]:
    """Returns, for each start, every arm's area less that of the better PPO, all its tasks together."""
    table = []
    for start in STARTS:
        tasks = [(results, better_ppo(results)) for task, results in by_task.items() if task.start == start]
        tasks = [(results, reference) for results, reference in tasks if reference]
        for name in dict.fromkeys(name for results, _ in tasks for name in results if name not in PPO):
            pairs = [
                (area(results[name].best), area(results[reference].best))
                for results, reference in tasks
                if name in results
            ]
            table.append([f"{start} %", name, str(len(pairs)), show(compare(pairs, difference), "+.3f")])
    return table


# ---- Files ----------------------------------------------------------------------------------------------------------
def write_report(
    rows: Sequence[Row], out: Path, arms: Mapping[Task, Sequence[str]], settings: Settings, size: dict[str, int]
) -> None:
    """Writes `table.md`, `runs.csv`, `curves.png` and `curves_dark.png` of the tasks that have been run.

    Args:
        rows: of `cells.read_rows`.
        out: folder.
        arms: names of the arms of each task.
        settings: size of the experiment.
        size: of a run.
    """
    by_task = {
        task: results
        for task, names in arms.items()
        if (results := read_results(rows, task.name, names, settings, size))
    }
    if not by_task:
        return say("no task has runs with fresh seeds yet")
    out.mkdir(parents=True, exist_ok=True)
    text = ""
    for task, results in by_task.items():
        first = np.mean([np.array(result.best["success"])[:, 0] for result in results.values()])
        num_draws = max(map(len, tuned_scores(rows, task.name, arms[task], settings, size).values()))
        text += f"\n## {task.name}\n\nBest of {num_draws} draws, {settings.num_fresh_seeds} fresh seeds; "
        text += f"{first:.1%} at the start.\n\n" + markdown(HEADER, task_table(results))
    pooled = markdown(("start", "arm", "tasks", "area less PPO's"), pooled_table(by_task))
    (out / "table.md").write_text(f"## By start, all tasks together\n\n{pooled}{text}", "utf-8")
    _write_csv(by_task, out / "runs.csv")
    draw_curves(by_task, out / "curves.png")
    say(f"{out}: {len(by_task)} tasks")


def _write_csv(by_task: Results, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "arm", "choice", "draw", "seed", "area", "steps_to_90", "first", "last"])
        for task, results in by_task.items():
            for name, result in results.items():
                choices = [("best", result.best_draw, result.best), ("median", result.median_draw, result.median)]
                for choice, draw, row in choices:
                    for seed, run in enumerate([] if row is None else row["success"]):
                        steps = steps_to_target(row)[seed]
                        shown = [f"{np.mean(run):.4f}", "inf" if math.isinf(steps) else int(steps), run[0], run[-1]]
                        writer.writerow([task.name, name, choice, draw, FIRST_FRESH_SEED + seed, *shown])


def draw_curves(by_task: Results, path: Path) -> None:
    """Draws the interquartile mean of success over environment steps, a panel for each task."""
    num_columns = min(4, len(by_task))
    num_rows = math.ceil(len(by_task) / num_columns)
    colours = {
        name: colour
        for name, colour in zip(DRAWN, PALETTE, strict=True)
        if any(name in results for results in by_task.values())
    }

    def draw(figure, theme):
        axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).ravel()
        for axis, (task, results) in zip(axes, by_task.items(), strict=False):
            style_axis(axis, theme)
            axis.set_title(task.name, color=theme.text, fontsize=9, loc="left")
            for name in colours.keys() & results.keys():
                row = results[name].best
                middle = [100 * interquartile_mean(column) for column in np.transpose(row["success"])]
                axis.plot(np.mean(row["steps"], axis=0), middle, color=colours[name], linewidth=1.8)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_ylim(0, 101)
        for axis in axes[len(by_task) :]:
            axis.set_visible(False)
        handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        legend = {"ncols": 3, "frameon": False, "labelcolor": theme.text, "fontsize": 8}
        figure.legend(handles=handles, loc="outside upper left", **legend)

    save_figure(draw, path, size=(max(6.4, 2.6 * num_columns), 0.9 + 2.1 * num_rows))
