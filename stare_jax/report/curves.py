"""Learning curves of run directories: the lines that count, minutes, moving means, the moment a target is reached."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import MinLen

from stare_jax.config import UserError
from stare_jax.documents import check_record, read_json
from stare_jax.evaluate.record import PHASE_ORDER, PhaseResult, load_results
from stare_jax.logging import last_lines, read_metrics
from stare_jax.rollout.validation import VALIDATED

SUCCESS, STEPS = "env/success", "env/steps"
VALIDATION_TIME = "time/validation_s"
NUM_VALIDATIONS = 2
"""Successive validations whose mean has to reach a target."""
BEFORE = "sft"
NUM_ENDS = 5
"""Iterations at the beginning and at the end of a run over which the table averages success."""


class CurveError(UserError, ValueError):
    """Runs that cannot be compared; the message names got and expected."""


class Series(NamedTuple):
    """Metrics of a run, one row an iteration, `[I]` float64 each."""

    iteration: np.ndarray
    env_steps: np.ndarray
    minutes: np.ndarray
    success: np.ndarray
    metrics: dict[str, np.ndarray]
    """All metrics by name, NaN where an iteration has none."""


class LearningCurve(NamedTuple):
    """Metrics and evaluations of one run, which is one seed of a setting."""

    label: str
    name: str
    """Name of the run's folder."""
    seed: str
    task: str
    series: Series
    by_clock: bool
    """True if the minutes are those of the wall clock, pauses included."""
    before: PhaseResult | None
    after: PhaseResult | None


# ------------------------------------------------------------------------------------------------------------ reading


def read_runs(settings: Mapping[str, Sequence[str | Path]], phase: str) -> list[LearningCurve]:
    """Reads the runs of each setting; folders of one name within a setting are told apart by a number.

    Args:
        settings: label -> run directories.
        phase: phase of the metrics.

    Raises:
        CurveError: see `read_run`; a run is given twice in a setting.
    """
    runs: list[LearningCurve] = []
    for label, directories in settings.items():
        resolved = [Path(directory).resolve() for directory in directories]
        if twice := [d for d, path in zip(directories, resolved, strict=True) if resolved.count(path) > 1]:
            raise CurveError(f"{label}: got {twice[0]} twice, expected each run once")
        group: list[LearningCurve] = []
        for directory in directories:
            run = read_run(label, directory, phase)
            num_namesakes = sum(path.name == run.name for path in resolved[: len(group)])
            group.append(run._replace(name=f"{run.name} ({num_namesakes + 1})") if num_namesakes else run)
        runs += group
    return runs


def read_run(label: str, directory: str | Path, phase: str) -> LearningCurve:
    """Reads one run.

    Raises:
        CurveError: there is no such run, or it has logged no episodes in that phase.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CurveError(f"{label}: got {directory}, expected a run directory, but there is none")
    lines = read_metrics(directory)
    rows = last_lines(lines, phase)
    if not rows:
        found = ", ".join(dict.fromkeys(str(line.get("phase")) for line in lines)) or "none"
        raise CurveError(f"{label}: {directory}: got metrics of the phases: {found}; expected some of {phase}")
    if missing := [name for name in (SUCCESS, STEPS) if not any(name in row for row in rows)]:
        raise CurveError(f"{label}: {directory}: got no {' and no '.join(missing)} in {phase}, expected both")
    series, by_clock = make_series(rows)
    config = read_config(directory)
    results = results_so_far(directory)
    seed, task = str(config.get("seed", "–")), str(config.get("env", {}).get("env_id", "–"))
    return LearningCurve(
        label, directory.resolve().name, seed, task, series, by_clock, results.get(BEFORE), results.get(phase)
    )


def make_series(rows: Sequence[Mapping[str, Any]]) -> tuple[Series, bool]:
    """Returns the columns of the lines of a run, and whether the minutes had to be read from the clock.

    Minutes are the sum of `time/*_s`, the seconds an iteration took without its validation; where an iteration has
    none, they are those since the first line was written.
    """
    names = sorted({name for row in rows for name in row if "/" in name})
    columns = {name: np.array([float(row.get(name, math.nan)) for row in rows]) for name in names}
    timed = [name for name in names if name.startswith("time/") and name.endswith("_s") and name != VALIDATION_TIME]
    seconds = np.array([sum(row.get(name, 0.0) for name in timed) for row in rows], float)
    by_clock = not (np.isfinite(seconds).all() and (seconds > 0).all())
    wall_time = np.array([row.get("wall_time", math.nan) for row in rows], float)
    minutes = (wall_time - wall_time[0]) / 60 if by_clock else np.cumsum(seconds) / 60
    iteration = np.array([row["step"] for row in rows], float)
    return Series(iteration, columns[STEPS], minutes, columns[SUCCESS], columns), by_clock


def has_curve(directory: str | Path, phase: str) -> bool:
    """Says whether a run has logged episodes of a phase."""
    return any(SUCCESS in row for row in last_lines(read_metrics(directory), phase))


def results_so_far(directory: Path, *, passed: frozenset[Path] = frozenset()) -> dict[str, PhaseResult]:
    """Returns phase -> evaluation of a run, and of the phases of the runs whose weights it began from.

    Runs that were `passed` on the way here are not gone to again: a run may lie where the one it began from has lain.
    """
    passed |= {directory.resolve()}
    own = {result.phase: result for result in load_results(directory)}
    source = read_config(directory).get("init_from")
    # A path is relative to the folder in which the command was given, which is often the clone that holds the runs.
    places = [Path(), *directory.resolve().parents] if source else []
    begun = next((place / source for place in places if (place / source).is_dir()), None)
    if begun is None or begun.name not in PHASE_ORDER or begun.parent.resolve() in passed:
        return own
    before = PHASE_ORDER[: PHASE_ORDER.index(begun.name) + 1]
    earlier = results_so_far(begun.parent, passed=passed)
    return {phase: result for phase, result in earlier.items() if phase in before} | own


class _Environment(NamedTuple):
    env_id: str = ""
    tasks: tuple[str, ...] = ()


class _Config(NamedTuple):
    """Fields of a run's configuration that reports read; those of any version have them, or none."""

    seed: int | None = None
    env: _Environment = _Environment()
    phases: Annotated[tuple[str, ...], MinLen(1)] = ("",)
    init_from: str = ""


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration of a run as JSON, {} where there is none; raises DocumentError for a damaged one."""
    file = directory / "config.json"
    fields = read_json(file, optional=True)
    check_record(_Config, fields, str(file))
    return fields


def check_comparable(runs: Sequence[LearningCurve], metrics: Sequence[str]) -> None:
    """Raises `CurveError` for runs of different tasks, and for a metric that no run has."""
    tasks = {run.task: run for run in runs if run.task != "–"}
    if len(tasks) > 1:
        found = ", ".join(f"{task} ({run.label}: {run.name})" for task, run in tasks.items())
        raise CurveError(f"env_id: got {found}; expected one task")
    known = {name for run in runs for name in run.series.metrics}
    if wrong := [name for name in metrics if name not in known]:
        raise CurveError(f"metrics: got {', '.join(wrong)}; expected some of {', '.join(sorted(known))}")


# -------------------------------------------------------------------------------------------------------- mathematics


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of each value and the `window - 1` before it (fewer at the beginning), NaNs left out."""
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    counted = counts[end] - counts[start]
    return np.where(counted > 0, (sums[end] - sums[start]) / np.maximum(counted, 1), np.nan)


def first_reached(success: np.ndarray, target: float, window: int) -> int | None:
    """Returns the first index where the mean of `window` successive values is at least the target; None for never.

    Means of fewer values, at the beginning or where some are not known, do not count: one lucky iteration is no
    success rate.
    """
    is_there = moving_mean(success, window) >= target - 1e-9  # of rounding in running sums
    num_known = np.convolve(np.isfinite(success), np.ones(window))[: len(success)]
    is_there &= num_known == window
    return int(is_there.argmax()) if is_there.any() else None


def target_at(series: Series, target: float, window: int) -> int | None:
    """Returns the index of the iteration after which the policy has reached the target; None for never.

    It is judged by its validations, `NUM_VALIDATIONS` at a time, where the run has some, or else by the episodes that
    it learns from, those of `window` successive iterations.
    """
    validated = series.metrics.get(VALIDATED, np.empty(0))
    known = np.flatnonzero(np.isfinite(validated))
    if not len(known):
        return first_reached(series.success, target, window)
    at = first_reached(validated[known], target, NUM_VALIDATIONS)
    return None if at is None else max(int(known[at]) - 1, 0)  # An iteration validates the policy it begins with.


def mean_curve(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], *, num_points: int = 300
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns x and y of the mean of curves (x, y) where all are defined; None for one curve, or nowhere."""
    known = [(x[ok], y[ok]) for x, y in curves if (ok := np.isfinite(y)).any()]
    if len(known) < 2 or len(known) < len(curves):
        return None
    start, end = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    if start >= end:
        return None
    x = np.linspace(start, end, num_points)
    return x, np.mean([np.interp(x, *curve) for curve in known], axis=0)


def ends(success: np.ndarray) -> tuple[float, float]:
    """Returns the mean success of the first and of the last iterations."""
    return tuple(
        float(np.nanmean(part)) if np.isfinite(part).any() else math.nan
        for part in (success[:NUM_ENDS], success[-NUM_ENDS:])
    )


def by_label(runs: Sequence[LearningCurve]) -> dict[str, list[LearningCurve]]:
    groups: dict[str, list[LearningCurve]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups
