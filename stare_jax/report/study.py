"""Tables and curves of a study's folder: methods by tasks over seeds, beside the paper's numbers, and learning curves.

A study's folder holds a run directory for every <task>/<method>/seed_<n>. Runs may be missing or under way. A run of
several tasks counts for each of them, as a method that is named after the run's folder, too.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.evaluate.intervals import Estimate, mean_interval, ratio_of_means
from stare_jax.evaluate.record import PhaseResult, load_results
from stare_jax.logging import print_table, replace_text
from stare_jax.report.comparison import Choices, markdown_table, write_comparison
from stare_jax.report.curves import CurveError, LearningCurve, first_reached, has_curve, read_config, read_runs
from stare_jax.report.published import OPENVLA, PI05, PUBLISHED
from stare_jax.report.tables import MISSING, OUTCOMES, Table, task_results

RUNS = "seed_*"
PPO = "ppo"


class StudyRun(NamedTuple):
    """One run of a study."""

    task: str
    method: str
    seed: str
    directory: Path
    config: Mapping[str, Any]
    """as JSON."""
    result: PhaseResult | None
    """evaluation of its last phase; None where there is none yet."""


def find_runs(folder: str | Path, order: Sequence[str] = ()) -> list[StudyRun]:
    """Returns the runs of a study's folder by method, task and seed; methods in an order that is given, others follow.

    Raises:
        CurveError: there is none.
    """
    found = []
    for directory in sorted(Path(folder).glob(f"*/*/{RUNS}")):
        config = read_config(directory)
        if directory.is_dir() and config:
            task, method = directory.parts[-3:-1]
            results = {result.phase: result for result in load_results(directory)}
            result = results.get(config.get("phases", [""])[-1])
            run = StudyRun(task, method, directory.name.removeprefix("seed_"), directory, config, result)
            found += _of_each_task(run) if is_of_several(run) else [run]
    if not found:
        raise CurveError(
            f"study: got {folder}, expected a folder with runs in <task>/<method>/seed_<n>; there are none"
        )
    ranks = {method: rank for rank, method in enumerate(order)}
    return sorted(found, key=lambda run: (ranks.get(run.method, len(ranks)), run.method, run.task, _number(run.seed)))


def is_of_several(run: StudyRun) -> bool:
    """True if one policy learns several tasks in this run."""
    return bool(run.config.get("env", {}).get("tasks"))


def _of_each_task(run: StudyRun) -> list[StudyRun]:
    parts = {} if run.result is None else {task: of_task for task, (of_task,) in task_results([run.result]).items()}
    return [
        run._replace(task=task, method=f"{run.method}, {run.task}", result=parts.get(task))
        for task in run.config["env"]["env_id"].split("+")
    ]


def _tasks(runs: Sequence[StudyRun]) -> list[str]:
    return sorted({run.task for run in runs})


def _number(seed: str) -> int:
    return int(seed) if seed.isdecimal() else 0


# ------------------------------------------------------------------------------------------------------------- tables


def success_table(runs: Sequence[StudyRun], outcome: str) -> Table:
    """Returns one row a method, one column a task and their average: mean over seeds, %, Student's 95 % interval.

    Rows of published numbers follow those of ours that the paper reports, too. A single run has Wilson's interval.

    Args:
        runs: of a study.
        outcome: "success_once" or "success_end"; the paper's is the first.
    """
    tasks = _tasks(runs)
    backbone = PI05 if "num_denoising_steps" in runs[0].config.get("model", {}) else OPENVLA
    header, rows = (f"{OUTCOMES[outcome]}, %", *tasks, "average"), []
    for method in dict.fromkeys(run.method for run in runs):
        of_task = {task: [r for r in runs if (r.task, r.method) == (task, method) and r.result] for task in tasks}
        cells = [_mean_cell([_rate(run, outcome) for run in of_task[task]]) for task in tasks]
        rows.append((method, *cells, _average_cell(of_task, outcome)))
        published = PUBLISHED[backbone].get(method, {})
        if outcome == "success_once" and all(task in published for task in tasks):
            values = [published[task] for task in tasks]
            average = f"{statistics.mean(values):.1f}"
            rows.append((f"published: {method}, {backbone}", *(f"{value:.1f}" for value in values), average))
    return header, rows


def _rate(run: StudyRun, outcome: str) -> Estimate:
    return getattr(run.result.summary, outcome)


def _mean_cell(rates: Sequence[Estimate]) -> str:
    if not rates:
        return MISSING
    estimate = rates[0] if len(rates) == 1 else mean_interval([rate.value for rate in rates])
    return _in_percent(estimate, len(rates))


def _average_cell(of_task: Mapping[str, Sequence[StudyRun]], outcome: str) -> str:
    """Returns the mean over tasks, of the seeds that every task has."""
    by_seed = [{run.seed: _rate(run, outcome).value for run in runs} for runs in of_task.values()]
    seeds = set.intersection(*map(set, by_seed))
    if not seeds:
        return MISSING
    return _in_percent(mean_interval([statistics.mean(rates[seed] for rates in by_seed) for seed in seeds]), len(seeds))


def _in_percent(estimate: Estimate, number: int) -> str:
    value, low, high = (100 * x for x in estimate)
    limits = "" if math.isnan(low) else f" [{max(low, 0.0):.1f}, {min(high, 100.0):.1f}]"
    return f"{value:.1f}{limits} ({number})"


def steps_table(curves: Sequence[LearningCurve], choices: Choices, baseline: str) -> Table:
    """Returns one row a method: runs that reached the target, median steps, ratio of the mean steps to a baseline's.

    Runs are paired by seed; the interval is a 95 % bootstrap over the pairs. A run that did not reach the target counts
    with all the steps that it took, so the ratio of a method of which one did not is a lower bound, and that to a
    baseline of which one did not an upper bound.
    """
    header = ("setting", "reached", "median steps", f"steps / {baseline}'s", "pairs")
    steps: dict[str, dict[str, tuple[float, bool]]] = {}
    for run in curves:
        at = first_reached(run.series.success, choices.target, choices.smooth)
        has_reached = at is not None
        number = float(run.series.env_steps[at if has_reached else -1])
        steps.setdefault(run.label, {})[run.seed] = (number, has_reached)
    rows = []
    for label, by_seed in steps.items():
        median = statistics.median(number if reached else math.inf for number, reached in by_seed.values())
        shown = f"{median:,.0f}" if math.isfinite(median) else "not reached"
        reached = f"{sum(reached for _, reached in by_seed.values())} of {len(by_seed)}"
        rows.append((label, reached, shown, *_ratio_cells(by_seed, steps.get(baseline, {}), label == baseline)))
    return header, rows


def _ratio_cells(ours: Mapping[str, tuple[float, bool]], theirs: Mapping[str, tuple[float, bool]], is_same: bool):
    seeds = [seed for seed in ours if seed in theirs]
    if is_same or not seeds:
        return MISSING, MISSING
    value, low, high = ratio_of_means([ours[seed][0] for seed in seeds], [theirs[seed][0] for seed in seeds])
    cut = [not all(side[seed][1] for seed in seeds) for side in (ours, theirs)]
    mark = {(True, False): "≥ ", (False, True): "≤ ", (True, True): "? "}.get(tuple(cut), "")
    return f"{mark}{value:.2f} [{low:.2f}, {high:.2f}]", str(len(seeds))


def csv_text(runs: Sequence[StudyRun]) -> str:
    """Returns one row a run: its rates, of the stages, too; cells of runs without an evaluation are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    rates = ("success_once", "success_end", "grasped", "contacted")
    header = ("task", "method", "seed", "phase", "checkpoint", "episodes", "temperature", *rates, "stages")
    writer.writerow(header)
    for run in runs:
        row: list[object] = [run.task, run.method, run.seed, run.config["phases"][-1]]
        if run.result is not None:
            summary, info = run.result.summary, run.result.evaluation.info
            row += [info.checkpoint, summary.num_episodes, f"{info.temperature:g}"]
            row += [f"{getattr(summary, name).value:.6g}" for name in rates]
            row.append(" ".join(f"{stage.name}={stage.num_completed}/{stage.num_given}" for stage in summary.stages))
        writer.writerow(row + [""] * (len(header) - len(row)))
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- files


def write_study(
    runs: Sequence[StudyRun], out: str | Path, choices: Choices, *, rows: Mapping[str, str], baseline: str
) -> None:
    """Writes and prints the tables of a study, and for each task its learning curves in a folder of their own.

    Args:
        runs: see `find_runs`.
        out: folder to write into: README.md, success.csv, <task>/ with curves.
        choices: target, smoothing and panels of the curves, of the phase ppo.
        rows: method -> a line that says what it is.
        baseline: method whose steps the others' are divided by.
    """
    out = Path(out)
    tables = [success_table(runs, outcome) for outcome in OUTCOMES]
    parts = [f"# {Path(out).name}", *(markdown_table(*table) for table in tables), "\n".join(_notes(runs))]
    for table in tables:
        print_table(*table)
        print()
    for task in _tasks(runs):
        settings: dict[str, list[Path]] = {}
        for run in runs:
            if run.task == task and not is_of_several(run) and has_curve(run.directory, PPO):
                settings.setdefault(run.method, []).append(run.directory)
        if settings:
            curves = read_runs(settings, PPO)
            known = {name for run in curves for name in run.series.metrics}
            panels = tuple(name for name in choices.metrics if name in known)
            write_comparison(curves, out / task, choices._replace(metrics=panels))
            title = f"{task}: environment steps until {100 * choices.target:g} % of training episodes succeed"
            header, cells = steps_table(curves, choices, baseline)
            print_table(header, cells, title=title)
            print()
            parts += [f"## {title}", markdown_table(header, cells), f"[Curves and numbers]({task}/README.md)"]
    methods = dict.fromkeys(run.method for run in runs)
    parts.append("\n".join(f"- {method}: {rows[method]}" for method in methods if method in rows))
    replace_text(out / "success.csv", csv_text(runs))
    replace_text(out / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _notes(runs: Sequence[StudyRun]) -> list[str]:
    infos = [(run.result.evaluation.info, run.result.summary) for run in runs if run.result is not None]
    protocols = sorted({(summary.num_episodes, info.temperature) for info, summary in infos})
    words = [f"{number} episodes at temperature {temperature:g}" for number, temperature in protocols]
    notes = [f"Ours: mean over seeds (their number), 95 % Student interval; one seed: Wilson. {'; '.join(words)}."]
    notes.append("The average is over the seeds that every task has. All runs: [success.csv](success.csv).")
    notes.append(
        "Published: the paper's tables 1 and 2, policies of billions of parameters on images; no run of this library."
    )
    notes.append(
        "Ratios of steps are paired by seed, with a 95 % bootstrap interval. A run that did not reach the target "
        "counts with all its steps: ≥ and ≤ mark ratios that are bounds for that reason, ? those that are neither."
    )
    return [f"- {note}" for note in notes]
