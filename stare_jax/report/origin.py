"""Origin of a study's numbers: commands, seeds, machines, days and hours, as run directories tell them."""

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stare_jax.documents import check_record, read_json
from stare_jax.logging import last_lines, read_metrics
from stare_jax.report.comparison import markdown_table, without_paths
from stare_jax.report.study_runs import StudyRun, phase_of
from stare_jax.report.tables import MISSING, Table

SECTION = "How these numbers were made"
"""Title of the section of a README that captions point to."""
_LAST_SECOND = 4e9
"""seconds since the epoch; later ones, in the year 2096, are no times of a run"""


class Origin(NamedTuple):
    """Origin of one run; "" and NaN stand for unknown."""

    command: str
    days: tuple[str, ...]
    """first and last day on which metrics were written."""
    train_minutes: float
    """time that steps or iterations took, pauses and demonstrations left out."""
    eval_minutes: float
    machine: str


class _Attempt(NamedTuple):
    """Fields of the record that launch/study.py keeps beside a run's folder."""

    arguments: tuple[str, ...] = ()


class _Versions(NamedTuple):
    """Fields of a phase's versions.json; those of any version have them, or none."""

    platform: str = ""
    processor: str | None = None
    cpu_count: int | None = None
    device: str = ""
    commit: str | None = None
    modified: bool = False


def read_origin(run: StudyRun) -> Origin:
    """Returns how a run was made.

    Raises:
        DocumentError: one of its files is damaged.
    """
    phase = phase_of(run.config)
    file = run.directory.with_name(f"{run.directory.name}.json")
    attempt = check_record(_Attempt, read_json(file, optional=True), str(file))
    lines = last_lines(read_metrics(run.directory), phase)
    seconds = [
        value for line in lines for name, value in line.items() if name.startswith("time/") and name[-2:] == "_s"
    ]
    times = [time for line in lines if 0 < (time := line.get("wall_time", math.nan)) < _LAST_SECOND]
    days = tuple(dict.fromkeys(_day(time) for time in (min(times), max(times)))) if times else ()
    evaluated = math.nan if run.result is None else run.result.evaluation.info.wall_s / 60
    command = ""
    if attempt.arguments:
        command = without_paths(" ".join(("python launch/train.py", *map(_quoted, attempt.arguments))))
    return Origin(command, days, sum(seconds) / 60 if seconds else math.nan, evaluated, _machine(run, phase))


def _machine(run: StudyRun, phase: str) -> str:
    file = run.directory / phase / "versions.json"
    fields = read_json(file, optional=True)
    if not fields:
        return ""
    versions = check_record(_Versions, fields, str(file))
    cores = f"{versions.cpu_count} cores" if versions.cpu_count else ""
    commit = f"commit {versions.commit[:10]}{' with changes' if versions.modified else ''}" if versions.commit else ""
    return ", ".join(filter(None, (versions.processor or versions.platform, cores, versions.device, commit)))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _quoted(word: str) -> str:
    return f"'{word}'" if any(character in word for character in " ()*'\"") else word


def caption(runs: Sequence[StudyRun]) -> str:
    """Returns a line for under a table: seeds, episodes and decoding of its runs, and where the rest is told."""
    runs = [run for run in runs if run.result is not None]
    if not runs:
        return "*No run has been evaluated yet.*"
    by_task: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: (len(run.seed), run.seed)):
        seeds = by_task.setdefault(run.task, [])
        seeds += [] if run.seed in seeds else [run.seed]
    seeds: dict[str, list[str]] = {}
    for task, of_task in by_task.items():
        seeds.setdefault(", ".join(of_task), []).append(task)
    words = [f"seeds {s}" + (f" ({', '.join(sorted(t))})" if len(seeds) > 1 else "") for s, t in sorted(seeds.items())]
    protocols = sorted({(run.result.summary.num_episodes, run.result.evaluation.info.temperature) for run in runs})
    words += [
        f"{number} episodes a run, {f'temperature {temperature:g}' if temperature else 'greedy'}"
        for number, temperature in protocols
    ]
    text = "; ".join(words)
    return f"*{text[0].upper()}{text[1:]}. Commands, machines, times: [below](#{SECTION.lower().replace(' ', '-')}).*"


def origins_text(runs: Sequence[StudyRun], commands: Sequence[str]) -> str:
    """Returns the section of a README that the captions point to.

    Args:
        runs: of a study.
        commands: the one that writes the tables, and others that were given.
    """
    origins = {run.directory: read_origin(run) for run in runs}
    machines = list(dict.fromkeys(origin.machine for origin in origins.values() if origin.machine))
    parts = [f"## {SECTION}", _block([without_paths(command) for command in commands])]
    parts += [markdown_table(*origins_table(runs, origins, machines))]
    parts += ["\n".join(f"{number}. {machine}" for number, machine in enumerate(machines, start=1))]
    parts += [
        "Minutes are those of one run: steps or iterations of its last phase, and its evaluation. A command is that of "
        "the first seed; other seeds differ in the seed and in folders."
    ]
    made = _commands(runs, origins)
    return "\n\n".join(filter(None, [*parts, _block(made) if made else ""]))


def origins_table(runs: Sequence[StudyRun], origins: Mapping[Path, Origin], machines: Sequence[str]) -> Table:
    """Returns one row a method and task: seeds, episodes, minutes, days, and the numbers of the machines."""
    header = ("method", "task", "seeds", "episodes of a seed", "minutes of training", "minutes of evaluation")
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault((run.method, run.task), []).append(run)
    rows = []
    for (method, task), group in groups.items():
        made = [origins[run.directory] for run in group]
        numbers = sorted({run.result.summary.num_episodes for run in group if run.result is not None})
        days = sorted({day for origin in made for day in origin.days})
        used = sorted({str(machines.index(origin.machine) + 1) for origin in made if origin.machine})
        row = (method, task, ", ".join(run.seed for run in group), " or ".join(map(str, numbers)) or MISSING)
        row += (_range([origin.train_minutes for origin in made]), _range([origin.eval_minutes for origin in made]))
        rows.append(
            (*row, " to ".join(dict.fromkeys((days[0], days[-1]))) if days else MISSING, ", ".join(used) or MISSING)
        )
    return (*header, "days", "machine"), rows


def _commands(runs: Sequence[StudyRun], origins: Mapping[Path, Origin]) -> list[str]:
    """Returns the command of the first run of each method and task of which one is known."""
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        if command := origins[run.directory].command:
            found.setdefault((run.method, run.task), command)
    return list(dict.fromkeys(found.values()))


def _block(lines: Sequence[str]) -> str:
    return "```\n" + "\n".join(lines) + "\n```"


def _range(minutes: Sequence[float]) -> str:
    known = [f"{value:.1f}" for value in sorted(minutes) if math.isfinite(value)]
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else MISSING
