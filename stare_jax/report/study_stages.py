"""Figures 5 and 6 of a study: stages by method, differences paired by seed, and STA-PPO with one signal turned off."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.over_runs import paired_changes, pooled_rates
from stare_jax.report.difference_figure import draw_differences
from stare_jax.report.figures import draw_rates
from stare_jax.report.study_runs import StudyRun, by_method, pairs_of_runs, phase_of
from stare_jax.report.study_tables import mean_cell, mean_rate, rate_of
from stare_jax.report.tables import MISSING, OUTCOMES, Table, percent

STAGES_PNG, TOGGLES_PNG = "stages.png", "toggles.png"
CONTROLS = {"tpo": ("grape", "chosen")}
"""Phase -> the methods that the others of this phase are compared with."""
PATTERN = ("moderate drop", "moderate drop", "", "largest drop, more than 20 %")
"""The paper's words on figure 6, whose numbers it does not print: reach, grasp, transport or lift, place or upright."""


class Change(NamedTuple):
    """A method minus another one on a task."""

    task: str
    method: str
    minus: str
    outcomes: tuple[str, ...]
    """K stages and two rates of success."""
    estimates: tuple[Estimate, ...]
    """empty where nothing can be paired."""
    num_pairs: int
    obstacle: str
    """reason why runs of equal seeds are left out, "" for none."""


class Toggles(NamedTuple):
    """Methods that differ in the signal of one stage."""

    all_on: str
    off: dict[int, str]
    """stage -> the method without its signal."""


def find_changes(runs: Sequence[StudyRun], task: str, baseline: str) -> list[Change]:
    """Returns the differences of a task: every method and the controls of its phase, every toggle and all on.

    Args:
        runs: of a study.
        task: whose runs count.
        baseline: method that the others of the phase ppo are compared with.
    """
    methods, toggles = by_method(runs, task), find_toggles(runs, task)
    off = list(toggles.off.values()) if toggles else []
    changes = []
    for method, of_method in methods.items():
        phase = phase_of(of_method[0].config)
        controls = (toggles.all_on,) if method in off else CONTROLS.get(phase, (baseline,) if phase == "ppo" else ())
        for minus in controls[: controls.index(method)] if method in controls else controls:
            if minus in methods:
                changes.append(_change(task, of_method, methods[minus]))
    return changes


def _change(task: str, first: Sequence[StudyRun], second: Sequence[StudyRun]) -> Change:
    pairs, obstacle = pairs_of_runs(first, second)
    outcomes = (*first[0].result.evaluation.info.stage_names, *OUTCOMES.values())
    estimates = tuple(paired_changes(pairs)) if pairs else ()
    return Change(task, first[0].method, second[0].method, outcomes, estimates, len(pairs), obstacle)


def find_toggles(runs: Sequence[StudyRun], task: str) -> Toggles | None:
    """Returns the methods without the signal of one stage, and the one that differs in nothing else; None for none.

    Methods are told by their configurations, whatever their names are.
    """
    firsts = {method: of_method[0] for method, of_method in by_method(runs, task).items()}
    for all_on, base in firsts.items():
        if phase_of(base.config) == "ppo" and _stages_off(base) == ():
            off = {
                _stages_off(run)[0]: method
                for method, run in firsts.items()
                if len(_stages_off(run)) == 1 and _other_fields(run) == _other_fields(base)
            }
            if off:
                return Toggles(all_on, dict(sorted(off.items())))
    return None


def _stages_off(run: StudyRun) -> tuple[int, ...]:
    enabled = run.config.get("stages", {}).get("enabled") or ()
    return tuple(stage for stage, is_on in enumerate(enabled) if not is_on)


def _other_fields(run: StudyRun) -> dict[str, object]:
    """Returns what decides the last phase of a run, without its seed and its switches."""
    stages = {name: value for name, value in run.config.get("stages", {}).items() if name != "enabled"}
    learner = {name: value for name, value in run.config.get("ppo", {}).items() if name != "seed"}
    start = run.config.get("init_from", "").replace(f"seed_{run.seed}", "seed")
    return {"stages": stages, "ppo": learner, "start": start, "phases": run.config.get("phases")}


# ------------------------------------------------------------------------------------------------------------- tables


def stages_table(runs: Sequence[StudyRun], task: str) -> Table:
    """Returns one row a method: P(stage | the stage before) of all episodes together with Wilson's interval and counts;
    the rates of success are means over seeds, as in `success_table`."""
    methods = by_method(runs, task)
    names = next(iter(methods.values()))[0].result.evaluation.info.stage_names
    header = ("P(stage | the stage before), %", *names, *OUTCOMES.values(), "seeds", "episodes of a seed")
    rows = []
    for method, of_method in methods.items():
        rates = pooled_rates([run.result.evaluation for run in of_method])[: len(names)]
        cells = [f"{percent(rate)} ({reached}/{given})" for reached, given, rate in rates]
        cells += [mean_cell([rate_of(run, outcome) for run in of_method]) for outcome in OUTCOMES]
        numbers = sorted({run.result.summary.num_episodes for run in of_method})
        rows.append((method, *cells, ", ".join(run.seed for run in of_method), " or ".join(map(str, numbers))))
    return header, rows


def changes_table(changes: Sequence[Change]) -> Table:
    """Returns one row a difference: each stage and the rates of success, points of % with their intervals."""
    header = ("difference, points", *changes[0].outcomes, "pairs of seeds")
    return header, [(f"{change.method} − {change.minus}", *change_cells(change), _pairs(change)) for change in changes]


def change_cells(change: Change) -> list[str]:
    """Returns the differences of all outcomes as text; without an interval there is no number."""
    estimates = change.estimates or (Estimate(math.nan, math.nan, math.nan),) * len(change.outcomes)
    return [in_points(estimate) for estimate in estimates]


def in_points(estimate: Estimate) -> str:
    """Returns a difference of rates and its interval in points of %, with signs."""
    if any(map(math.isnan, estimate)):
        return MISSING
    value, low, high = (100 * x for x in estimate)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def toggles_table(toggles: Toggles, runs: Sequence[StudyRun], changes: Sequence[Change]) -> Table:
    """Returns one row a stage: success without its signal, the same minus all on, and the paper's words."""
    methods = by_method(runs, changes[0].task)
    header = ("without the signal of", *OUTCOMES.values(), *(f"{name}, minus all on" for name in OUTCOMES.values()))

    def success(method: str) -> list[str]:
        return [mean_cell([rate_of(run, outcome) for run in methods[method]]) for outcome in OUTCOMES]

    rows = [(f"none ({toggles.all_on})", *success(toggles.all_on), MISSING, MISSING, "", "")]
    for stage, change in _of_toggles(toggles, changes):
        name, cells = change.outcomes[stage], change_cells(change)[-len(OUTCOMES) :]
        words = PATTERN[stage] if stage < len(PATTERN) else ""
        rows.append((f"{name} ({change.method})", *success(change.method), *cells, words, _pairs(change)))
    return (*header, "published: figure 6", "pairs of seeds"), rows


def _of_toggles(toggles: Toggles, changes: Sequence[Change]) -> Iterator[tuple[int, Change]]:
    for stage, method in toggles.off.items():
        yield from ((stage, c) for c in changes if (c.method, c.minus) == (method, toggles.all_on))


def _pairs(change: Change) -> str:
    return f"{change.num_pairs}" + (f"; others not paired: {change.obstacle}" if change.obstacle else "")


# -------------------------------------------------------------------------------------------------------------- files


def draw_stages(runs: Sequence[StudyRun], task: str, folder: Path) -> bool:
    """Draws figure 5 of a task, the methods of the preference phase and the imitation that they begin from.

    Returns False, and draws nothing, where no method of that phase has been evaluated.
    """
    methods = by_method(runs, task)
    phases = {method: phase_of(of_method[0].config) for method, of_method in methods.items()}
    if "tpo" not in phases.values():
        return False
    shown = {method: methods[method] for method, phase in phases.items() if phase in ("sft", "tpo")}
    names = next(iter(shown.values()))[0].result.evaluation.info.stage_names
    series = {}
    for method, of_method in shown.items():
        rates = pooled_rates([run.result.evaluation for run in of_method])[: len(names)]
        success = [mean_rate([rate_of(run, outcome) for run in of_method]) for outcome in OUTCOMES]
        series[method] = [*(rate for _, _, rate in rates), *success]
    groups = [*names, "success,\nany step", "success,\nat the end"]
    draw_rates(groups, series, folder / STAGES_PNG, title=f"{task}: P(stage | the stage before)")
    return True


def draw_toggles(toggles: Toggles, changes: Sequence[Change], folder: Path) -> None:
    """Draws figure 6 of a task: success without the signal of each stage minus success with all."""
    of_stages = [change for _, change in _of_toggles(toggles, changes)]
    groups = [f"without\n{change.outcomes[stage]}" for stage, change in _of_toggles(toggles, changes)]
    nothing = (Estimate(math.nan, math.nan, math.nan),) * len(OUTCOMES)
    series = {
        name: [(change.estimates or nothing)[-len(OUTCOMES) :][place] for change in of_stages]
        for place, name in enumerate(OUTCOMES.values())
    }
    title = f"{changes[0].task}: success minus that of {toggles.all_on}"
    draw_differences(groups, series, folder / TOGGLES_PNG, title=title)


def stages_csv(runs: Sequence[StudyRun], tasks: Sequence[str]) -> str:
    """Returns one row a rate of all episodes of a method: counts, value, limits of the 95 % Wilson interval."""
    rows = []
    for task in tasks:
        for method, of_method in by_method(runs, task).items():
            evaluations = [run.result.evaluation for run in of_method]
            outcomes = (*evaluations[0].info.stage_names, *OUTCOMES.values())
            for outcome, (reached, given, rate) in zip(outcomes, pooled_rates(evaluations), strict=True):
                rows.append((task, method, outcome, reached, given, *_digits(rate), len(of_method)))
    return _csv(("task", "method", "outcome", "reached", "given", "value", "low", "high", "seeds"), rows)


def changes_csv(changes: Sequence[Change]) -> str:
    """Returns one row a difference: value, and limits of the 95 % bootstrap interval."""
    rows = [
        (change.task, change.method, change.minus, outcome, *_digits(estimate), change.num_pairs)
        for change in changes
        for outcome, estimate in zip(change.outcomes, change.estimates, strict=False)
    ]
    return _csv(("task", "method", "minus", "outcome", "value", "low", "high", "pairs"), rows)


def _digits(estimate: Estimate) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.6g}" for value in estimate]


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()
