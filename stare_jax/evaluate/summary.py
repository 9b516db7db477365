"""What an evaluation amounts to: rates with intervals, stage by stage, paired differences; and its file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stare_jax.evaluate.intervals import Estimate, paired_difference, wilson_interval
from stare_jax.evaluate.protocol import Episodes, EvalInfo, Evaluation
from stare_jax.logging import replace_text


class StageRate(NamedTuple):
    """P(stage k is completed | stage k-1 is completed); stage 0 is given in every episode."""

    name: str
    num_completed: int
    num_given: int
    rate: Estimate


class Summary(NamedTuple):
    """Rates over the valid episodes with 95 % Wilson intervals for the number of distinct starts among them."""

    num_episodes: int
    num_dropped: int
    num_distinct: int
    success_end: Estimate
    success_once: Estimate
    grasped: Estimate
    contacted: Estimate
    median_steps: float
    """median number of actions up to the first success, over the episodes that have one; NaN where none has."""
    stages: tuple[StageRate, ...]


class Comparison(NamedTuple):
    """Success of one evaluation minus that of another on the same seeds, with Tango's 95 % score interval."""

    difference: Estimate
    num_gained: int
    num_lost: int
    num_pairs: int
    num_distinct: int


def summarize(evaluation: Evaluation) -> Summary:
    """Returns the rates of an evaluation; dropped episodes are left out of all of them and counted."""
    episodes = evaluation.episodes
    counted = _take(episodes, episodes.valid)
    given = np.concatenate([np.ones_like(counted.completed[:, :1]), counted.completed[:, :-1]], axis=1)
    stages = tuple(
        StageRate(
            name=name,
            num_completed=int(counted.completed[given[:, k], k].sum()),
            num_given=int(given[:, k].sum()),
            rate=_rate(counted.completed[given[:, k], k], counted.start[given[:, k]]),
        )
        for k, name in enumerate(evaluation.info.stage_names)
    )
    success_at = counted.success_at[counted.success_once]
    return Summary(
        num_episodes=len(counted.seed),
        num_dropped=int((~episodes.valid).sum()),
        num_distinct=len(np.unique(counted.start)),
        success_end=_rate(counted.success_end, counted.start),
        success_once=_rate(counted.success_once, counted.start),
        grasped=_rate(counted.grasped, counted.start),
        contacted=_rate(counted.contacted, counted.start),
        median_steps=float(np.median(success_at)) if len(success_at) else float("nan"),
        stages=stages,
    )


def compare(first: Evaluation, second: Evaluation, outcome: str = "success_once") -> Comparison:
    """Returns the rate of the first minus that of the second over the seeds where both have a valid episode.

    Args:
        first, second: evaluations of the same task; they need not have all seeds in common.
        outcome: a bool field of `Episodes`.

    Raises:
        ValueError: they are of different tasks.
    """
    if first.info.env_id != second.info.env_id:
        raise ValueError(f"env_id: got {second.info.env_id}, expected {first.info.env_id}, to compare like with like")
    a, b = _take(first.episodes, first.episodes.valid), _take(second.episodes, second.episodes.valid)
    _, rows_a, rows_b = np.intersect1d(a.seed, b.seed, return_indices=True)
    won, lost = getattr(a, outcome)[rows_a], getattr(b, outcome)[rows_b]
    num_gained, num_lost, num_pairs = int((won & ~lost).sum()), int((lost & ~won).sum()), len(rows_a)
    num_distinct = len(np.unique(a.start[rows_a]))
    weight = num_distinct / num_pairs if num_pairs else 1.0
    difference = paired_difference(num_gained * weight, num_lost * weight, num_pairs * weight)
    return Comparison(difference, num_gained, num_lost, num_pairs, num_distinct)


def mean_and_std(evaluations: Sequence[Evaluation], outcome: str = "success_once") -> tuple[float, float]:
    """Returns mean and sample standard deviation of a rate over evaluations of several training seeds; NaN for one."""
    rates = [getattr(summarize(evaluation), outcome).value for evaluation in evaluations]
    return float(np.mean(rates)), float(np.std(rates, ddof=1)) if len(rates) > 1 else float("nan")


def _rate(is_success: np.ndarray, start: np.ndarray) -> Estimate:
    """Repeats of one start are not independent: the rate is that of all rows, its width that of the distinct ones."""
    num_distinct = len(np.unique(start))
    return wilson_interval(float(np.mean(is_success)) * num_distinct if num_distinct else 0.0, num_distinct)


def _take(episodes: Episodes, rows: np.ndarray) -> Episodes:
    return Episodes(*(np.asarray(field)[rows] for field in episodes))


def save_evaluation(path: str | Path, evaluation: Evaluation, **extra: Any) -> None:
    """Writes an evaluation as JSON: info, summary (for readers; recomputed when loaded), episodes, and extras."""
    document = {
        **extra,
        "info": evaluation.info._asdict(),
        "summary": _plain(summarize(evaluation)),
        "episodes": {name: field.tolist() for name, field in evaluation.episodes._asdict().items()},
    }
    replace_text(Path(path), json.dumps(document, indent=1) + "\n")


def load_evaluation(path: str | Path) -> Evaluation:
    """Reads what `save_evaluation` wrote."""
    document = json.loads(Path(path).read_text())
    info = EvalInfo(**document["info"])
    episodes = Episodes(**{name: np.asarray(values) for name, values in document["episodes"].items()})
    return Evaluation(info._replace(stage_names=tuple(info.stage_names)), episodes)


def _plain(value: Any) -> Any:
    """Nested records as dicts, NaN as None, because JSON knows neither."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
