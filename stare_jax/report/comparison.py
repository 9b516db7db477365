"""Several settings, each a few runs, compared by their learning curves: a figure, a file of numbers, tables."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.record import PhaseResult
from stare_jax.logging import print_table, replace_text
from stare_jax.report.curve_figure import Curve, Panel, draw_comparison
from stare_jax.report.curves import (
    BEFORE,
    NUM_ENDS,
    NUM_VALIDATIONS,
    SUCCESS,
    LearningCurve,
    by_label,
    ends,
    mean_curve,
    moving_mean,
    target_at,
)
from stare_jax.report.tables import MISSING, Table

DIAGNOSTICS = ("validation/success", "ppo/approx_kl", "ppo/clip_frac", "ppo/explained_variance", "ppo/entropy")


class Choices(NamedTuple):
    """Phase, panels, target and smoothing of a comparison."""

    phase: str = "ppo"
    metrics: tuple[str, ...] = DIAGNOSTICS
    target: float = 0.95
    smooth: int = 5
    """Iterations of the moving average."""
    commands: tuple[str, ...] = ()
    """Commands that made the runs."""


# ------------------------------------------------------------------------------------------------------------- tables


def runs_table(runs: Sequence[LearningCurve], choices: Choices) -> Table:
    """Returns one row a run."""
    to = f"to {100 * choices.target:g} %"
    header = ("setting", "run", "seed", f"after {BEFORE}, %", f"after {choices.phase}, %", f"first {NUM_ENDS}, %")
    header += (f"last {NUM_ENDS}, %", f"steps {to}", f"minutes {to}", "steps", "minutes")
    rows = []
    for run in runs:
        series, (first, last) = run.series, ends(run.series.success)
        at = target_at(series, choices.target, choices.smooth)
        reached = ("not reached",) * 2
        if at is not None:
            reached = (_count(series.env_steps[at]), f"{series.minutes[at]:.1f}")
        total = (_count(series.env_steps[-1]), f"{series.minutes[-1]:.1f}")
        evaluated = (_evaluated(run.before), _evaluated(run.after))
        rows.append((run.label, run.name, run.seed, *evaluated, _percent(first), _percent(last), *reached, *total))
    return header, rows


def settings_table(runs: Sequence[LearningCurve], choices: Choices) -> Table:
    """Returns one row a setting; a run that did not reach the target counts as slower than any that did."""
    header = ("setting", "runs", "reached", "median steps to target", "median minutes to target")
    rows = []
    for label, group in by_label(runs).items():
        at = [target_at(run.series, choices.target, choices.smooth) for run in group]
        steps, minutes = (
            statistics.median(
                math.inf if i is None else float(column[i]) for i, column in zip(at, columns, strict=True)
            )
            for columns in ([run.series.env_steps for run in group], [run.series.minutes for run in group])
        )
        shown = (_count(steps), f"{minutes:.1f}") if math.isfinite(steps) else ("not reached",) * 2
        rows.append((label, str(len(group)), str(sum(i is not None for i in at)), *shown))
    return header, rows


def _evaluated(result: PhaseResult | None) -> str:
    if result is None:
        return MISSING
    rate = result.summary.success_once
    return f"{_percent(rate.value)} [{_percent(rate.low)}, {_percent(rate.high)}]"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}" if math.isfinite(rate) else MISSING


def _count(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else MISSING


# -------------------------------------------------------------------------------------------------------------- files


def write_comparison(runs: Sequence[LearningCurve], out: str | Path, choices: Choices) -> Path:
    """Writes `curves.png`, `curves_dark.png`, `curves.csv` and `README.md` into a folder; returns its path."""
    out = Path(out)
    successes, others = make_panels(runs, choices)
    draw_comparison(successes, others, out / "curves.png", target=choices.target)
    replace_text(out / "curves.csv", csv_text(runs, choices.metrics))
    replace_text(out / "README.md", readme_text(runs, choices))
    return out


def make_panels(runs: Sequence[LearningCurve], choices: Choices) -> tuple[list[Panel], list[Panel]]:
    """Returns the panels of success, by steps and by minutes, and one a diagnostic."""

    def panel(title: str, x_label: str, x: str, metric: str, evaluations=({}, {})) -> Panel:
        curves, means = {}, {}
        for label, group in by_label(runs).items():
            values = [run.series.metrics.get(metric, np.full(len(run.series.minutes), np.nan)) for run in group]
            places = [getattr(run.series, x) for run in group]
            curves[label] = [Curve(*xy, moving_mean(xy[1], choices.smooth)) for xy in zip(places, values, strict=True)]
            if (mean := mean_curve([(curve.x, curve.smooth) for curve in curves[label]])) is not None:
                means[label] = mean
        return Panel(title, x_label, curves, means, *evaluations)

    estimates = _estimates(runs, "before", BEFORE), _estimates(runs, "after", choices.phase)
    by_clock = any(run.by_clock for run in runs)
    clock = "minutes by the clock, pauses included" if by_clock else "minutes of training"
    successes = [panel("Success of training episodes by steps", "environment steps", "env_steps", SUCCESS, estimates)]
    successes += [panel("Success of training episodes by time", clock, "minutes", SUCCESS, estimates)]
    return successes, [panel(name, "environment steps", "env_steps", name) for name in choices.metrics]


def _estimates(runs: Sequence[LearningCurve], when: str, phase: str) -> dict[str, dict[str, list[Estimate]]]:
    found: dict[str, list[Estimate]] = {}
    for run in runs:
        if (result := getattr(run, when)) is not None and math.isfinite(result.summary.success_once.value):
            found.setdefault(run.label, []).append(result.summary.success_once)
    return {phase: found} if found else {}


def csv_text(runs: Sequence[LearningCurve], metrics: Sequence[str]) -> str:
    """Returns one row an iteration of a run; cells of metrics that were not logged are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("label", "run", "iteration", "env_steps", "minutes", "success", *metrics))
    for run in runs:
        series = run.series
        missing = np.full(len(series.iteration), np.nan)
        columns = [series.minutes, series.success, *(series.metrics.get(name, missing) for name in metrics)]
        for i, (iteration, steps) in enumerate(zip(series.iteration, series.env_steps, strict=True)):
            values = ["" if math.isnan(column[i]) else f"{column[i]:.6g}" for column in columns]
            writer.writerow((run.label, run.name, int(iteration), f"{steps:.0f}", *values))
    return file.getvalue()


def readme_text(runs: Sequence[LearningCurve], choices: Choices) -> str:
    """Returns the settings that were compared, the tables, notes on how to read them, and the commands."""
    labels, task = list(by_label(runs)), next((run.task for run in runs if run.task != "–"), "")
    picture = picture_of("curves.png", f"Learning curves of {_cell(', '.join(labels))}")
    parts = [f"# {' against '.join(labels)}" + (f", {task}" if task else "")]
    parts += [f"Phase {choices.phase}, {len(runs)} runs of {len(labels)} settings. Numbers: [curves.csv](curves.csv)."]
    parts += [picture, markdown_table(*runs_table(runs, choices)), markdown_table(*settings_table(runs, choices))]
    parts += ["\n".join(_notes(runs, choices))]
    if choices.commands:
        commands = "\n".join(without_paths(command.strip()) for command in choices.commands)
        parts += [f"Commands:\n\n```\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def _notes(runs: Sequence[LearningCurve], choices: Choices) -> list[str]:
    """Returns notes on how to read the numbers."""
    evaluations = [run.before for run in runs] + [run.after for run in runs]
    protocols = sorted({_protocol(result) for result in evaluations if result is not None})
    target = f"{100 * choices.target:g} %"
    notes = []
    if protocols:
        notes.append(
            f"after {BEFORE}, after {choices.phase}: success at any step of evaluation episodes "
            f"({'; '.join(protocols)}), with 95 % Wilson intervals; – where there was no evaluation."
        )
    notes.append(
        f"first {NUM_ENDS}, last {NUM_ENDS}: mean success of the training episodes, whose actions are sampled, in the "
        f"first and last {NUM_ENDS} iterations."
    )
    window = f"mean of {choices.smooth} successive iterations" if choices.smooth > 1 else "success of an iteration"
    notes.append(
        f"to {target}: the first time the {window} is at least {target}; of a run with validations, where the policy "
        f"decides as in an evaluation, the mean of {NUM_VALIDATIONS} successive ones."
    )
    notes.append(f"Lines show means of {choices.smooth} iterations, thick ones those over runs, as far as all runs go.")
    notes.append("Medians count a run that did not reach the target as slower than any that did.")
    by_clock = [f"{run.label}: {run.name}" for run in runs if run.by_clock]
    notes.append("Minutes are the time iterations took, pauses, evaluations and validations left out.")
    if by_clock:
        notes.append(
            f"These runs have not logged the time of every iteration; their minutes are those of the clock from the "
            f"end of the first iteration on, pauses included: {', '.join(by_clock)}."
        )
    return [f"- {note}" for note in notes]


def _protocol(result: PhaseResult) -> str:
    temperature = result.evaluation.info.temperature
    decoding = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return f"{result.summary.num_episodes} episodes, {decoding}"


def picture_of(file: str, alt: str) -> str:
    """Returns a figure as Markdown, in its dark version on a dark page.

    Args:
        file: PNG file, relative to the page.
        alt: words for readers who do not see it.
    """
    dark = f"{file.removesuffix('.png')}_dark.png"
    source = f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>\n{source}\n  <img src="{file}" alt="{alt}">\n</picture>'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def without_paths(text: str) -> str:
    """Replaces the folders of absolute paths by `…`: they tell nothing about a run."""
    return re.sub(r"(?<![\w./~…-])/(?:[^\s/'\"=,:;]+/)*([^\s/'\"=,:;]+)/?", r"…/\1", text)


def print_comparison(runs: Sequence[LearningCurve], choices: Choices) -> None:
    """Prints the tables of the `README.md`."""
    print_table(*runs_table(runs, choices), title=f"{choices.phase}: success, steps, minutes")
    print()
    print_table(*settings_table(runs, choices))
