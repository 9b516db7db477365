"""Tables of a report: rates with intervals, paired differences, stage by stage; rows of text for terminal and page."""

import math
from collections.abc import Sequence

from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.record import PhaseResult
from stare_jax.evaluate.summary import Comparison, compare, of_tasks, pairing_obstacle

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""(header, rows)."""
OUTCOMES = {"success_once": "success at any step", "success_end": "success at the end"}
HOLDING_STAGE = "grasp"
"""Name of the stage of tasks in which the object is held."""
MISSING = "–"
"""Text of a number that is not known."""


def rates_table(results: Sequence[PhaseResult]) -> Table:
    """Returns one column an evaluation: rates in % with their intervals, counts of episodes.

    Whether the object was held is told of tasks in which it is to be.
    """
    summaries = [result.summary for result in results]
    rates = {**OUTCOMES, "contacted": "touched the object"}
    if any(HOLDING_STAGE in result.evaluation.info.stage_names for result in results):
        rates["grasped"] = "held the object"
    rows = [(name, *(percent(getattr(s, field)) for s in summaries)) for field, name in rates.items()]
    rows.append(("median steps to success", *(_number(s.median_steps) for s in summaries)))
    rows.append(("episodes, distinct starts", *(f"{s.num_episodes}, {s.num_distinct}" for s in summaries)))
    perturbations = [result.evaluation.info.perturbation for result in results]
    if any(perturbations):
        rows.append(("perturbation", *(name or "none" for name in perturbations)))
    if any(s.num_dropped for s in summaries):
        rows.append(("lost with a simulator", *(str(s.num_dropped) for s in summaries)))
    return ("% of episodes", *(result.phase for result in results)), rows


def task_results(results: Sequence[PhaseResult]) -> dict[str, list[PhaseResult]]:
    """Returns task -> the evaluations as if it had been the only one; where each is of one task, "" -> `results`."""
    if not any(result.evaluation.info.tasks for result in results):
        return {"": list(results)}
    parts: dict[str, list[PhaseResult]] = {}
    for result in results:
        for part in of_tasks(result.evaluation):
            name = part.info.env_id
            of_task = result._replace(evaluation=part, summary=result.summary.tasks.get(name, result.summary))
            parts.setdefault(name, []).append(of_task)
    return parts


def tasks_table(results: Sequence[PhaseResult], outcome: str) -> Table:
    """Returns one row a task and one for their mean: a rate in % with its interval, one column an evaluation.

    Args:
        results: evaluations of several tasks.
        outcome: key of `OUTCOMES`.
    """
    several = [result for result in results if result.summary.tasks]
    rows = []
    for task in dict.fromkeys(task for result in several for task in result.summary.tasks):
        found = [result.summary.tasks.get(task) for result in several]
        rows.append((task, *(percent(getattr(one, outcome)) if one else MISSING for one in found)))
    rows.append(("average", *(percent(getattr(result.summary, outcome)) for result in several)))
    return (f"{OUTCOMES[outcome]}, %", *(result.phase for result in several)), rows


def differences_table(results: Sequence[PhaseResult]) -> Table:
    """Returns one row a pair of evaluations; those that cannot be paired say why."""
    header = ("difference", *(f"{name}, points" for name in OUTCOMES.values()), "won : lost : pairs")
    rows = []
    for later, earlier in pairs_of_phases(results):
        name = f"{later.phase} − {earlier.phase}"
        if obstacle := pairing_obstacle(later.evaluation, earlier.evaluation):
            rows.append((name, f"not paired: {obstacle}", MISSING, MISSING))
            continue
        comparisons = [compare(later.evaluation, earlier.evaluation, outcome) for outcome in OUTCOMES]
        counts = f"{comparisons[0].num_gained} : {comparisons[0].num_lost} : {comparisons[0].num_pairs}"
        rows.append((name, *map(points, comparisons), counts))
    return header, rows


def stages_table(results: Sequence[PhaseResult]) -> Table:
    """Returns one row a stage: P(stage | the stage before) in % with its interval, and counts."""
    header = ("stage", *(result.phase for result in results))
    rows = []
    for k, name in enumerate(results[0].evaluation.info.stage_names):
        stages = [result.summary.stages[k] for result in results]
        cells = [f"{percent(stage.rate)} ({stage.num_completed}/{stage.num_given})" for stage in stages]
        rows.append((name, *cells))
    return header, rows


def pairs_of_phases(results: Sequence[PhaseResult]) -> list[tuple[PhaseResult, PhaseResult]]:
    """Returns every phase with the one before it, and with the first that was trained."""
    results = [result for result in results if result.phase != "expert"] or list(results)
    pairs = []
    for index, later in enumerate(results[1:], start=1):
        earlier = [results[index - 1]] + ([results[0]] if index > 1 else [])
        pairs += [(later, other) for other in earlier if other.evaluation.info.env_id == later.evaluation.info.env_id]
    return pairs


def percent(rate: Estimate) -> str:
    """Returns a rate and its interval in %, as `40.0 [16.8, 68.7]`."""
    if math.isnan(rate.value):
        return MISSING
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def points(comparison: Comparison) -> str:
    """Returns a difference and its interval in points of %, with signs."""
    value, low, high = comparison.difference
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _number(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:g}"
