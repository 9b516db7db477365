"""Goals of a study of the paper's claims: what was wanted, what was measured, with intervals, and whether it is met."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stare_jax.report.curves import LearningCurve
from stare_jax.report.published import PUBLISHED
from stare_jax.report.study_runs import StudyRun, by_method
from stare_jax.report.study_stages import Change, Toggles, change_cells, in_points
from stare_jax.report.study_tables import (
    Ratio,
    Steps,
    backbone_of,
    mean_cell,
    mean_rate,
    rate_of,
    ratio_of_steps,
    ratio_text,
)
from stare_jax.report.tables import OUTCOMES, Table

GOAL_TARGET = 0.8
"""Success rate until which steps are counted, see `curves.target_at`."""
HALF, BOUND = 0.5, 0.75
"""Largest ratio of STA-PPO's steps to PPO's that is wanted, and the largest upper bound of it."""
LAST_DROP = 0.2
"""Smallest drop without the last stage's signal that the paper tells of."""
YES, NO, OPEN = "yes", "no", "not decided"


class Goal(NamedTuple):
    """One claim on one task."""

    claim: str
    task: str
    ours: str
    wanted: str
    is_met: str
    """`YES`, `NO`, or `OPEN` where a bound or a missing interval leaves it open."""


class TaskNumbers(NamedTuple):
    """Measurements of one task that goals are judged by."""

    curves: Sequence[LearningCurve]
    steps: Mapping[str, Mapping[str, Steps]]
    """method -> seed -> steps until `GOAL_TARGET`."""
    changes: Sequence[Change]
    toggles: Toggles | None


def goals_table(runs: Sequence[StudyRun], numbers: Mapping[str, TaskNumbers]) -> Table | None:
    """Returns one row a goal that the study's methods can be judged by; None where there is none.

    Args:
        runs: of a study.
        numbers: task -> its measurements.
    """
    goals = []
    for task, of_task in numbers.items():
        goals += [*_speed(task, of_task.steps), *_level(task, runs), *_preference(task, of_task.changes)]
        goals += _pattern(task, of_task)
    return (("goal", "task", "ours", "wanted", "met"), goals) if goals else None


def _speed(task: str, steps: Mapping[str, Mapping[str, Steps]]) -> Iterator[Goal]:
    """Yields goal 1: half of PPO's steps, and fewer than with RL4VLA's reward."""
    for baseline, most, bound in (("ppo", HALF, BOUND), ("rl4vla", 1.0, 1.0)):
        ratio = ratio_of_steps(steps.get("sta_ppo", {}), steps.get(baseline, {}))
        if ratio is not None:
            claim = f"sta_ppo's steps to {100 * GOAL_TARGET:g} % success / {baseline}'s"
            wanted = f"at most {most:g}, upper bound below {bound:g}"
            yield Goal(claim, task, ratio_text(ratio), wanted, judge_ratio(ratio, most, bound))


def judge_ratio(ratio: Ratio, most: float, bound: float) -> str:
    """Says whether a ratio is at most one number, and its upper limit below another."""
    value, _, high = ratio.estimate
    is_small, (is_least, is_most) = value <= most and high < bound, ratio.is_cut
    if math.isnan(high) or (is_least if is_small else is_most):
        return OPEN
    return YES if is_small else NO


def _level(task: str, runs: Sequence[StudyRun]) -> Iterator[Goal]:
    """Yields goal 2: IPI succeeds as often as the paper's."""
    published = PUBLISHED[backbone_of(runs)]["ipi"].get(task)
    if published is not None and (of_method := by_method(runs, task).get("ipi")):
        rates = [rate_of(run, "success_once") for run in of_method]
        is_met = YES if 100 * mean_rate(rates).value >= published else NO
        yield Goal("ipi's success at any step, %", task, mean_cell(rates), f"at least {published}, published", is_met)


def _preference(task: str, changes: Sequence[Change]) -> Iterator[Goal]:
    """Yields goal 3: STA-TPO is ahead of TPO, and of more imitation."""
    for change in changes:
        if change.method == "sta_tpo" and change.estimates:
            success = change.estimates[-len(OUTCOMES)]
            is_met = OPEN if math.isnan(success.low) else YES if success.low > 0 else NO
            claim = f"success at any step, sta_tpo − {change.minus}, points"
            yield Goal(claim, task, in_points(success), "lower bound above 0", is_met)


def _pattern(task: str, numbers: TaskNumbers) -> Iterator[Goal]:
    """Yields goal 4: without the last stage's signal most is lost."""
    stages = {method: stage for stage, method in numbers.toggles.off.items()} if numbers.toggles else {}
    off = {stages[c.method]: c for c in numbers.changes if c.method in stages and c.estimates}
    last = max((len(change.outcomes) - len(OUTCOMES) - 1 for change in off.values()), default=-1)
    if last not in off or len(off) < 2:
        return
    drops = {stage: change.estimates[-len(OUTCOMES)].value for stage, change in off.items()}
    is_met = YES if drops[last] == min(drops.values()) and drops[last] <= -LAST_DROP else NO
    ours = [f"{change.outcomes[stage]} {change_cells(change)[-len(OUTCOMES)]}" for stage, change in sorted(off.items())]
    wanted = f"{off[last].outcomes[last]} the largest drop, {100 * LAST_DROP:g} or more"
    yield Goal("success at any step without a stage's signal, points", task, "; ".join(ours), wanted, is_met)
