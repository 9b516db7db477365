"""Runs of a study's folder, which holds a run directory for every <task>/<method>/seed_<n>."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.record import PhaseResult, load_results
from stare_jax.evaluate.summary import pairing_obstacle
from stare_jax.report.curves import CurveError, read_config
from stare_jax.report.tables import task_results

RUNS = "seed_*"


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

    Runs may be missing or under way. A run of several tasks counts for each of them, as a method that is named after
    the run's folder, too.

    Raises:
        CurveError: there is none.
    """
    found = []
    for directory in sorted(Path(folder).glob(f"*/*/{RUNS}")):
        config = read_config(directory)
        if directory.is_dir() and config:
            task, method = directory.parts[-3:-1]
            results = {result.phase: result for result in load_results(directory)}
            run = StudyRun(
                task, method, directory.name.removeprefix("seed_"), directory, config, results.get(phase_of(config))
            )
            found += _of_each_task(run) if is_of_several(run) else [run]
    if not found:
        raise CurveError(
            f"study: got {folder}, expected a folder with runs in <task>/<method>/seed_<n>; there are none"
        )
    ranks = {method: rank for rank, method in enumerate(order)}
    return sorted(found, key=lambda run: (ranks.get(run.method, len(ranks)), run.method, run.task, _number(run.seed)))


def phase_of(config: Mapping[str, Any]) -> str:
    """Returns the last phase of a run, "" where its configuration names none."""
    return config.get("phases", [""])[-1]


def is_of_several(run: StudyRun) -> bool:
    """True if one policy learns several tasks in this run."""
    return bool(run.config.get("env", {}).get("tasks"))


def tasks_of(runs: Sequence[StudyRun]) -> list[str]:
    """Returns the tasks, sorted."""
    return sorted({run.task for run in runs})


def by_method(runs: Sequence[StudyRun], task: str) -> dict[str, list[StudyRun]]:
    """Returns method -> the runs of a task that have been evaluated, in the order of the runs."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        if run.task == task and run.result is not None:
            found.setdefault(run.method, []).append(run)
    return found


def pairs_of_runs(
    first: Sequence[StudyRun], second: Sequence[StudyRun]
) -> tuple[list[tuple[Evaluation, Evaluation]], str]:
    """Returns the evaluations of equal seeds of two methods, and the reason why others are left out, "" for none."""
    others = {run.seed: run.result.evaluation for run in second}
    pairs = [(run.result.evaluation, others[run.seed]) for run in first if run.seed in others]
    obstacles = [pairing_obstacle(*pair) for pair in pairs]
    kept = [pair for pair, obstacle in zip(pairs, obstacles, strict=True) if not obstacle]
    return kept, next(filter(None, obstacles), "")


def csv_text(runs: Sequence[StudyRun]) -> str:
    """Returns one row a run: its rates, of the stages, too; cells of runs without an evaluation are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    rates = ("success_once", "success_end", "grasped", "contacted")
    header = ("task", "method", "seed", "phase", "checkpoint", "episodes", "temperature", *rates, "stages")
    writer.writerow(header)
    for run in runs:
        row: list[object] = [run.task, run.method, run.seed, phase_of(run.config)]
        if run.result is not None:
            summary, info = run.result.summary, run.result.evaluation.info
            row += [info.checkpoint, summary.num_episodes, f"{info.temperature:g}"]
            row += [f"{getattr(summary, name).value:.6g}" for name in rates]
            row.append(" ".join(f"{stage.name}={stage.num_completed}/{stage.num_given}" for stage in summary.stages))
        writer.writerow(row + [""] * (len(header) - len(row)))
    return file.getvalue()


def _of_each_task(run: StudyRun) -> list[StudyRun]:
    parts = {} if run.result is None else {task: of_task for task, (of_task,) in task_results([run.result]).items()}
    return [
        run._replace(task=task, method=f"{run.method}, {run.task}", result=parts.get(task))
        for task in run.config["env"]["env_id"].split("+")
    ]


def _number(seed: str) -> int:
    return int(seed) if seed.isdecimal() else 0
