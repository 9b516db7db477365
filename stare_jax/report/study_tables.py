"""Tables of a study: success by method and task beside the paper's numbers, and steps until a target is reached."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stare_jax.evaluate.intervals import Estimate, mean_interval, mean_of_rates, ratio_of_means
from stare_jax.report.curves import LearningCurve, target_at
from stare_jax.report.published import OPENVLA, PI05, PUBLISHED, PUBLISHED_HOLDING
from stare_jax.report.study_runs import StudyRun, tasks_of
from stare_jax.report.tables import HOLDING_STAGE, MISSING, OUTCOMES, Table

PAPER_POTENTIALS = {"sta_ppo": "sta_ppo_paper"}
"""Method -> the one of the paper's row, which stands beside it where a study has none of that one's own runs."""


def success_table(runs: Sequence[StudyRun], outcome: str) -> Table:
    """Returns one row a method, one column a task and their average: mean over seeds, %, Student's 95 % interval.

    Rows of published numbers follow those of ours that the paper reports, too. A single run has Wilson's interval.

    Args:
        runs: of a study.
        outcome: "success_once", "success_end", or "grasped"; the paper's are the first and the last.
    """
    tasks = tasks_of(runs)
    name = OUTCOMES.get(outcome, "held the object")
    header, rows = (f"{name}, %", *tasks, "average"), []
    methods = list(dict.fromkeys(run.method for run in runs))
    for method in methods:
        of_task = {task: [r for r in runs if (r.task, r.method) == (task, method) and r.result] for task in tasks}
        cells = [mean_cell([rate_of(run, outcome) for run in of_task[task]]) for task in tasks]
        rows.append((method, *cells, _average_cell(of_task, outcome)))
        theirs = PAPER_POTENTIALS.get(method, method)
        if theirs == method or theirs not in methods:
            rows += _published_row(theirs, tasks, outcome, backbone_of(runs))
    return header, rows


def holding_runs(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Returns the runs of the tasks in which the object is to be held."""
    holding = {run.task for run in runs if run.result and HOLDING_STAGE in run.result.evaluation.info.stage_names}
    return [run for run in runs if run.task in holding]


def backbone_of(runs: Sequence[StudyRun]) -> str:
    """Returns the model of the paper's tables that is of the runs' kind."""
    return PI05 if "num_denoising_steps" in runs[0].config.get("model", {}) else OPENVLA


def rate_of(run: StudyRun, outcome: str) -> Estimate:
    """Returns a rate of a run that has been evaluated."""
    return getattr(run.result.summary, outcome)


def mean_rate(rates: Sequence[Estimate]) -> Estimate:
    """Returns the mean over seeds with Student's 95 % interval within [0, 1], of a single run its own estimate."""
    if len(rates) == 1:
        return rates[0]
    value, low, high = mean_interval([rate.value for rate in rates])
    return Estimate(value, max(low, 0.0), min(high, 1.0))


def mean_cell(rates: Sequence[Estimate]) -> str:
    """Returns the mean over seeds in %, its interval and the number of seeds."""
    return _in_percent(mean_rate(rates), len(rates)) if rates else MISSING


def _published_row(method: str, tasks: Sequence[str], outcome: str, backbone: str) -> list[tuple[str, ...]]:
    tables = {"success_once": PUBLISHED, "grasped": PUBLISHED_HOLDING}
    published = tables.get(outcome, {}).get(backbone, {}).get(method, {})
    if not all(task in published for task in tasks):
        return []
    values = [published[task] for task in tasks]
    cells = (f"{value:.1f}" for value in (*values, statistics.mean(values)))
    return [(f"published: {method}, {backbone}", *cells)]


def _average_cell(of_task: Mapping[str, Sequence[StudyRun]], outcome: str) -> str:
    """Returns the mean over tasks, of the seeds that every task has."""
    by_seed = [{run.seed: rate_of(run, outcome) for run in runs} for runs in of_task.values()]
    means = [
        mean_of_rates([rates[seed] for rates in by_seed]) for seed in by_seed[0] if all(seed in r for r in by_seed)
    ]
    return mean_cell(means)


def _in_percent(estimate: Estimate, number: int) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f} [{low:.1f}, {high:.1f}] ({number})"


# -------------------------------------------------------------------------------------------------------------- steps


class Steps(NamedTuple):
    """Environment steps of a run until its target; all of its steps where it has not reached it."""

    number: float
    has_reached: bool


class Ratio(NamedTuple):
    """Ratio of the mean steps of two methods, over runs of equal seeds."""

    estimate: Estimate
    """95 % bootstrap over the pairs; NaN limits for one pair."""
    is_cut: tuple[bool, bool]
    """True of a side with a run that did not reach the target: the ratio is then a lower bound, or an upper one."""
    num_pairs: int


def steps_of(curves: Sequence[LearningCurve], target: float, smooth: int) -> dict[str, dict[str, Steps]]:
    """Returns method -> seed -> steps until the target is reached, see `target_at`."""
    found: dict[str, dict[str, Steps]] = {}
    for run in curves:
        at = target_at(run.series, target, smooth)
        number = float(run.series.env_steps[-1 if at is None else at])
        found.setdefault(run.label, {})[run.seed] = Steps(number, at is not None)
    return found


def ratio_of_steps(ours: Mapping[str, Steps], theirs: Mapping[str, Steps]) -> Ratio | None:
    """Returns the ratio of the mean steps of two methods; None where no seed has both."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    numbers = [[side[seed].number for seed in seeds] for side in (ours, theirs)]
    is_cut = tuple(not all(side[seed].has_reached for seed in seeds) for side in (ours, theirs))
    return Ratio(ratio_of_means(*numbers), is_cut, len(seeds))


def steps_table(steps: Mapping[str, Mapping[str, Steps]], baseline: str) -> Table:
    """Returns one row a method: runs that reached the target, median steps, ratio of the mean steps to a baseline's.

    Runs are paired by seed; the interval is a 95 % bootstrap over the pairs. A run that did not reach the target counts
    with all the steps that it took, so the ratio of a method of which one did not is a lower bound, and that to a
    baseline of which one did not an upper bound.
    """
    rows = []
    for label, by_seed in steps.items():
        median = statistics.median(number if reached else math.inf for number, reached in by_seed.values())
        shown = f"{median:,.0f}" if math.isfinite(median) else "not reached"
        reached = f"{sum(reached for _, reached in by_seed.values())} of {len(by_seed)}"
        ratio = None if label == baseline else ratio_of_steps(by_seed, steps.get(baseline, {}))
        cells = (MISSING, MISSING) if ratio is None else (ratio_text(ratio), str(ratio.num_pairs))
        rows.append((label, reached, shown, *cells))
    return ("setting", "reached", "median steps", f"steps / {baseline}'s", "pairs"), rows


def ratio_text(ratio: Ratio) -> str:
    """Returns a ratio with its interval, ≥ or ≤ before one that is a bound, ? before one that is neither."""
    mark = {(True, False): "≥ ", (False, True): "≤ ", (True, True): "? "}.get(ratio.is_cut, "")
    value, low, high = ratio.estimate
    limits = "one pair, no interval" if math.isnan(low) else f"{low:.2f}, {high:.2f}"
    return f"{mark}{value:.2f} [{limits}]"
