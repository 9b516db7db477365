"""README of a study's folder: success by method and task, goals, learning curves, stages, toggles, and their origin."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stare_jax.logging import print_table, replace_text
from stare_jax.report.comparison import Choices, markdown_table, picture_of, write_comparison
from stare_jax.report.curves import has_curve, read_runs
from stare_jax.report.origin import caption, origins_text
from stare_jax.report.study_goals import GOAL_TARGET, TaskNumbers, goals_table
from stare_jax.report.study_runs import StudyRun, by_method, csv_text, is_of_several, tasks_of
from stare_jax.report.study_stages import (
    STAGES_PNG,
    TOGGLES_PNG,
    changes_csv,
    changes_table,
    draw_stages,
    draw_toggles,
    find_changes,
    find_toggles,
    stages_csv,
    stages_table,
    toggles_table,
)
from stare_jax.report.study_tables import holding_runs, steps_of, steps_table, success_table
from stare_jax.report.tables import OUTCOMES, Table

PPO = "ppo"


def write_study(
    runs: Sequence[StudyRun], out: str | Path, choices: Choices, *, rows: Mapping[str, str], baseline: str
) -> None:
    """Writes and prints the tables of a study, and for each task its learning curves in a folder of their own.

    Args:
        runs: see `find_runs`.
        out: folder to write into: README.md, success.csv, stages.csv, differences.csv, and <task>/ with curves and
            pictures.
        choices: target, smoothing and panels of the curves, of the phase ppo; commands, the one that writes this first.
        rows: method -> a line that says what it is.
        baseline: method whose steps the others' are divided by, and whose success is taken from the others'.
    """
    out, tasks = Path(out), tasks_of(runs)
    numbers = {task: _measure(runs, task, choices.smooth, baseline) for task in tasks}
    parts = [f"# {out.name}", *_success_parts(runs)]
    if (goals := goals_table(runs, numbers)) is not None:
        parts += ["## Goals", _shown(goals, "Goals"), caption(runs)]
    for task in tasks:
        parts += _task_parts(runs, task, numbers[task], out, choices, baseline)
    methods = dict.fromkeys(run.method for run in runs)
    parts += ["## Methods and notes", "\n".join(f"- {method}: {rows[method]}" for method in methods if method in rows)]
    parts += ["\n".join(f"- {note}" for note in NOTES), origins_text(runs, choices.commands)]
    replace_text(out / "success.csv", csv_text(runs))
    replace_text(out / "stages.csv", stages_csv(runs, tasks))
    replace_text(out / "differences.csv", changes_csv([c for of_task in numbers.values() for c in of_task.changes]))
    replace_text(out / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _measure(runs: Sequence[StudyRun], task: str, smooth: int, baseline: str) -> TaskNumbers:
    settings: dict[str, list[Path]] = {}
    for run in runs:
        if run.task == task and not is_of_several(run) and has_curve(run.directory, PPO):
            settings.setdefault(run.method, []).append(run.directory)
    curves = read_runs(settings, PPO)
    changes, toggles = find_changes(runs, task, baseline), find_toggles(runs, task)
    return TaskNumbers(curves, steps_of(curves, GOAL_TARGET, smooth), changes, toggles)


def _success_parts(runs: Sequence[StudyRun]) -> list[str]:
    parts = []
    for outcome in OUTCOMES:
        parts += [_shown(success_table(runs, outcome)), caption(runs)]
    if holding := holding_runs(runs):
        parts += [_shown(success_table(holding, "grasped")), caption(holding)]
    return parts


def _task_parts(
    runs: Sequence[StudyRun], task: str, numbers: TaskNumbers, out: Path, choices: Choices, baseline: str
) -> list[str]:
    """Returns the parts of the README on one task, and writes its folder."""
    curves, of_task, parts = numbers.curves, [run for run in runs if run.task == task], [f"## {task}"]
    if curves:
        known = {name for run in curves for name in run.series.metrics}
        write_comparison(curves, out / task, choices._replace(metrics=tuple(n for n in choices.metrics if n in known)))
        title = f"Environment steps to {100 * choices.target:g} % success"
        steps = steps_table(steps_of(curves, choices.target, choices.smooth), baseline)
        parts += [f"### {title}", _shown(steps, f"{task}: {title}"), caption(of_task)]
        parts += [f"[Curves and numbers]({task}/README.md)"]
    if by_method(runs, task):
        parts += ["### Stages", _shown(stages_table(runs, task), task), caption(of_task)]
        if draw_stages(runs, task, out / task):
            parts.append(picture_of(f"{task}/{STAGES_PNG}", f"Stages of {task} by method"))
    if numbers.changes:
        parts += ["### Differences", _shown(changes_table(numbers.changes), task), caption(of_task)]
    if numbers.toggles:
        table = toggles_table(numbers.toggles, runs, numbers.changes)
        parts += [
            "### Stage toggles",
            _shown(table, f"{task}: STA-PPO without the signal of a stage"),
            caption(of_task),
        ]
        draw_toggles(numbers.toggles, numbers.changes, out / task)
        parts.append(picture_of(f"{task}/{TOGGLES_PNG}", f"Success on {task} without the signal of each stage"))
    return parts


def _shown(table: Table, title: str = "") -> str:
    """Prints a table and returns it as Markdown."""
    print_table(*table, title=title)
    print()
    return markdown_table(*table)


NOTES = (
    "Success is a mean over seeds (their number), with Student's 95 % interval; of one seed with Wilson's. The "
    "average is over the seeds that every task has; of one seed its interval is that of the tasks' episodes.",
    "P(stage | the stage before) is of the episodes of all seeds together, with Wilson's 95 % interval, which "
    "covers chance among episodes and not among seeds. All runs: [success.csv](success.csv); these rates: "
    "[stages.csv](stages.csv).",
    "Differences are of runs of equal seeds, over episodes from equal initial states; – where none can be paired. "
    "Their 95 % intervals are of a bootstrap that draws pairs of seeds anew, and in each of them initial states; of"
    " one pair, initial states alone. All of them: [differences.csv](differences.csv). An interval without a width "
    "means that all of these episodes ended alike, and not that nothing is left to chance.",
    "Published: the paper's tables 1 and 2, policies of billions of parameters on images; no run of this library. "
    "Figures 5 and 6 have no numbers in the paper's text. Of figure 5 it says that STA-TPO gains most over TPO in "
    "the stages grasp, place and upright; what it says of figure 6 stands in the table of toggles.",
    "Steps to a success rate are counted as the page of the task's curves says: by a run's validations or, where it "
    "has none, by the episodes that it learns from. Ratios of steps are paired by seed, with a 95 % bootstrap interval "
    "over the pairs. A run that did not reach the target counts with all its steps: ≥ and ≤ mark ratios that are "
    "bounds for that reason, ? those that are neither.",
)
