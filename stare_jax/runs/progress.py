"""Progress of a study: how far each run is, by what it has written, and how long the rest will take."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stare_jax.data.schema import MANIFEST_FILE, read_manifest
from stare_jax.logging import last_lines, read_metrics
from stare_jax.runs.config import RunConfig
from stare_jax.runs.directory import GROWING_FIELDS
from stare_jax.runs.jobs import Queue, State, last_lines_of, log_file, read_attempt
from stare_jax.runs.study import DEMOS, Job

NUM_LAST = 5
"""Iterations over which success and rate are averaged."""
UNKNOWN = "–"
_SHOWN = ("running", "elsewhere", "failed")


class Progress(NamedTuple):
    """The state of a run."""

    done: float
    """fraction of its demonstrations, steps or iterations; NaN where their number is not known."""
    success: float
    """success rate of the last training episodes; NaN where there are none."""
    rate: float
    """environment steps per second; NaN where there are none."""


def read_progress(directory: Path, config: RunConfig, phase: str) -> Progress:
    """Returns how far a run of one phase is.

    Args:
        directory: the run directory, which need not exist.
        config: its configuration.
        phase: the phase that it trains, or "demos".
    """
    if phase == DEMOS:
        folder = directory / "data" / "demos"
        number = len(read_manifest(folder).episodes) if (folder / MANIFEST_FILE).exists() else 0
        return Progress(min(1.0, number / config.demos.num_demos), math.nan, math.nan)
    rows = last_lines(read_metrics(directory), phase)
    field = GROWING_FIELDS.get(phase)
    done = math.nan if field is None else 0.0
    if rows and field is not None:
        done = min(1.0, rows[-1]["step"] / getattr(getattr(config, phase), field))
    means = [
        float(np.mean(values)) if (values := [row[name] for row in rows[-NUM_LAST:] if name in row]) else math.nan
        for name in ("env/success", "perf/env_steps_per_s")
    ]
    return Progress(done, *means)


def seconds_of_kinds(folder: Path, jobs: Sequence[Job]) -> dict[str, float]:
    """Returns the mean time of a whole job of each kind, seconds, for the kinds of which one is finished."""
    times: dict[str, list[float]] = {}
    for job in jobs:
        record = read_attempt(folder, job)
        if record is not None and record.exit_code == 0 and record.done_before < 1:
            times.setdefault(job.kind, []).append(record.seconds / (1 - record.done_before))
    return {kind: sum(seconds) / len(seconds) for kind, seconds in times.items()}


def job_seconds_left(
    job: Job, done: float, known: Mapping[str, float], *, elapsed: float = 0.0, done_before: float = 0.0
) -> float:
    """Returns the seconds that a job still takes, NaN where nothing says.

    Its own pace counts, once it has one; then the mean of its kind, then that of its method on other tasks.

    Args:
        job: the job.
        done: the fraction of it that is done.
        known: kind -> seconds, as `seconds_of_kinds` returns them.
        elapsed: seconds of the attempt that is under way.
        done_before: the fraction that was done when it began.
    """
    if done - done_before > 0.05:
        return elapsed * (1 - done) / (done - done_before)
    method = job.kind.split("/")[1]
    of_method = [seconds for kind, seconds in known.items() if kind.split("/")[1] == method]
    whole = known.get(job.kind, sum(of_method) / len(of_method) if of_method else math.nan)
    if math.isnan(whole):
        return math.nan
    left = 1.0 if math.isnan(done_before) else 1.0 - done_before
    return max(0.0, whole * left - elapsed)


class Row(NamedTuple):
    """A job, its state, its progress, and its time so far and left, seconds (NaN for unknown)."""

    job: Job
    state: State
    progress: Progress
    elapsed: float
    left: float


def read_rows(queue: Queue, configs: Mapping[str, RunConfig]) -> list[Row]:
    """Returns the state of every job of a queue.

    Args:
        queue: the queue.
        configs: name of a job -> its configuration.
    """
    known = seconds_of_kinds(queue.folder, queue.jobs)
    rows = []
    for job in queue.jobs:
        state, record = queue.states[job.name], read_attempt(queue.folder, job)
        progress = read_progress(queue.folder / job.name, configs[job.name], job.phase)
        elapsed = 0.0
        if state in ("running", "elsewhere"):
            elapsed = time.time() - record.started
        elif record is not None:
            elapsed = record.seconds or 0.0
        left = 0.0
        if state in ("waiting", "running", "elsewhere"):
            is_working = state != "waiting"
            before = record.done_before if is_working else progress.done
            left = job_seconds_left(
                job, progress.done, known, elapsed=elapsed if is_working else 0.0, done_before=before
            )
        rows.append(Row(job, state, progress, elapsed, left))
    return rows


def summary_line(name: str, rows: Sequence[Row], num_places: int) -> str:
    """Returns one line: how many runs are in which state, and how long the rest will take."""
    counts = {state: sum(row.state == state for row in rows) for state in ("running", "elsewhere", "failed", "blocked")}
    parts = [f"{sum(row.state == 'finished' for row in rows)} of {len(rows)} runs finished"]
    parts += [f"{count} {state}" for state, count in counts.items() if count]
    unknown = sum(math.isnan(row.left) for row in rows)
    left = sum(row.left for row in rows if not math.isnan(row.left)) / num_places
    if left:
        parts.append(f"about {in_hours(left)} left" + (f" without {unknown} runs of unknown length" if unknown else ""))
    return f"{name}: {', '.join(parts)}"


def progress_table(rows: Sequence[Row], *, everything: bool = False) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Returns header and rows of a table of the jobs that run or have failed, or of all."""
    header = ("run", "state", "done", "success", "steps/s", "time", "left")
    shown = [row for row in rows if everything or row.state in _SHOWN]
    return header, [
        (
            row.job.name,
            row.state,
            _percent(1.0 if row.state == "finished" else row.progress.done),
            _percent(row.progress.success),
            UNKNOWN if math.isnan(row.progress.rate) else f"{row.progress.rate:.0f}",
            in_hours(row.elapsed),
            in_hours(row.left) if row.left else "",
        )
        for row in shown
    ]


def failure_texts(queue: Queue, *, num_lines: int = 8) -> list[str]:
    """Returns, for each job that has failed, its name, its log and the last lines of that."""
    texts = []
    for job in queue.jobs:
        if queue.states[job.name] == "failed":
            log = log_file(queue.folder, job)
            record = read_attempt(queue.folder, job)
            lines = [f"{job.name} ended with {record.exit_code}; {log} ends:", *last_lines_of(log, num_lines)]
            texts.append("\n    ".join(lines))
    return texts


def in_hours(seconds: float) -> str:
    """Returns a time as `1:02 h` or `4:05 min`."""
    if math.isnan(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _percent(fraction: float) -> str:
    return UNKNOWN if math.isnan(fraction) else f"{100 * fraction:.0f} %"
