"""Summary of an evaluation: rates with intervals, stage by stage; differences of two, episode by episode."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from stare_jax.config import UserError
from stare_jax.evaluate.episodes import Episodes, take
from stare_jax.evaluate.intervals import (
    Estimate,
    mean_interval,
    mean_of_rates,
    paired_difference,
    wilson_interval,
)
from stare_jax.evaluate.protocol import Evaluation

SuccessName = Literal["success_once", "success_end"]
"""Names of the two rates of success."""


class PairingError(UserError, ValueError):
    """Two evaluations that cannot be compared episode by episode; the message names the reason, got and expected."""


class StageRate(NamedTuple):
    """Rate P(stage k is completed | stage k-1 is completed); stage 0 is given in every episode."""

    name: str
    num_completed: int
    num_given: int
    rate: Estimate


class Summary(NamedTuple):
    """Rates over the valid episodes with 95 % Wilson intervals for the number of distinct starts among them.

    Of several tasks the rates are means over the tasks, with intervals from those of the tasks; stages are of all
    episodes together.
    """

    num_episodes: int
    num_dropped: int
    num_distinct: int
    success_end: Estimate
    success_once: Estimate
    grasped: Estimate
    contacted: Estimate
    median_steps: float
    """Median number of actions up to the first success, over the episodes that have one; NaN where none has."""
    stages: tuple[StageRate, ...]
    tasks: dict[str, "Summary"]
    """Env id -> summary of one of several tasks; empty where there is one."""


class Comparison(NamedTuple):
    """Success of one evaluation minus that of another from the same states, with Tango's 95 % score interval."""

    difference: Estimate
    num_gained: int
    num_lost: int
    num_pairs: int
    num_distinct: int
    """Distinct initial states among the pairs; the interval is as wide as for so many pairs."""


def summarize(evaluation: Evaluation) -> Summary:
    """Returns the rates of an evaluation; lost episodes are left out of all of them and counted."""
    tasks = {part.info.env_id: summarize(part) for part in of_tasks(evaluation)} if evaluation.info.tasks else {}

    def rate_of(name: str) -> Estimate:
        if tasks:
            return mean_of_rates([getattr(summary, name) for summary in tasks.values()])
        return _rate(getattr(counted, name), counted.start)

    episodes = evaluation.episodes
    counted = take(episodes, episodes.valid)
    given = given_stages(counted.completed)
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
        success_end=rate_of("success_end"),
        success_once=rate_of("success_once"),
        grasped=rate_of("grasped"),
        contacted=rate_of("contacted"),
        median_steps=float(np.median(success_at)) if len(success_at) else float("nan"),
        stages=stages,
        tasks=tasks,
    )


def given_stages(completed: np.ndarray) -> np.ndarray:
    """Returns whether the stage before each is completed, bool `[E, K]`, from `[E, K]`; the first has none before."""
    return np.concatenate([np.ones_like(completed[:, :1]), completed[:, :-1]], axis=1)


def of_tasks(evaluation: Evaluation) -> list[Evaluation]:
    """Returns the part of each task, as an evaluation of its own; where there is one task, the evaluation."""
    info, episodes = evaluation
    return [
        Evaluation(
            info._replace(env_id=task.env_id, stage_names=task.stage_names, tasks=()),
            take(episodes, episodes.task == index)._replace(task=np.zeros((episodes.task == index).sum(), np.int32)),
        )
        for index, task in enumerate(info.tasks)
    ] or [evaluation]


def compare(first: Evaluation, second: Evaluation, outcome: SuccessName = "success_once") -> Comparison:
    """Returns the rate of the first minus that of the second, over pairs of episodes that began in the same state.

    Of several episodes from one state, the n-th of one evaluation is paired with the n-th of the other. Evaluations
    written before initial states were kept are paired by seed, if both are such and were made by the same protocol.

    Args:
        first, second: evaluations of the same task by the same protocol; they need not have all states in common.
        outcome: field of `Episodes`.

    Raises:
        PairingError: another task or protocol, or no initial state in common; see `pairing_obstacle`.
    """
    a, b = paired_episodes(first, second)
    won, lost = getattr(a, outcome), getattr(b, outcome)
    num_gained, num_lost, num_pairs = int((won & ~lost).sum()), int((lost & ~won).sum()), len(won)
    num_distinct = min(len(np.unique(a.start)), len(np.unique(b.start)))
    weight = num_distinct / num_pairs
    difference = paired_difference(num_gained * weight, num_lost * weight, num_pairs * weight)
    return Comparison(difference, num_gained, num_lost, num_pairs, num_distinct)


def paired_episodes(first: Evaluation, second: Evaluation) -> tuple[Episodes, Episodes]:
    """Returns the episodes of two evaluations that began in the same states, in one order; see `compare`.

    Raises:
        PairingError: as `compare` does.
    """
    if obstacle := _obstacle(first, second):
        raise PairingError(
            f"{obstacle.name}: got {obstacle.got}, expected {obstacle.expected}, to compare like with like"
        )
    a, b = take(first.episodes, first.episodes.valid), take(second.episodes, second.episodes.valid)
    _, rows_a, rows_b = np.intersect1d(_pair_names(a), _pair_names(b), return_indices=True)
    return take(a, rows_a), take(b, rows_b)


def pairing_obstacle(first: Evaluation, second: Evaluation) -> str:
    """Returns the reason why two evaluations are not compared episode by episode, "" if they can be."""
    obstacle = _obstacle(first, second)
    return f"{obstacle.name} {obstacle.expected} against {obstacle.got}" if obstacle else ""


class _Obstacle(NamedTuple):
    name: str
    got: str
    """Value of the second evaluation."""
    expected: str
    """Value of the first."""


_PROTOCOL = ("env_id", "horizon", "temperature", "backend", "jitter", "perturbation")
"""Fields of `EvalInfo` that have to be equal where episodes are compared one by one."""


def _obstacle(first: Evaluation, second: Evaluation) -> _Obstacle | None:
    for name in _PROTOCOL:
        of_first, of_second = getattr(first.info, name), getattr(second.info, name)
        if of_first != of_second:
            empty = "none" if name == "perturbation" else "unknown"
            return _Obstacle(name, got=_words(of_second, empty), expected=_words(of_first, empty))
    a, b = take(first.episodes, first.episodes.valid), take(second.episodes, second.episodes.valid)
    is_old = [bool((part.start_hash == "").any()) for part in (a, b)]
    if is_old[0] != is_old[1]:
        words = [_words("") if old else "known" for old in is_old]
        return _Obstacle("initial states", got=words[1], expected=words[0])
    if not np.intersect1d(_pair_names(a), _pair_names(b)).size:
        return _Obstacle("initial states in common", got=f"none of {len(b.seed)}", expected=f"some of {len(a.seed)}")
    return None


def _words(value: object, empty: str = "unknown") -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or empty


def _pair_names(episodes: Episodes) -> np.ndarray:
    """Returns a name of each episode: its initial state and the number of earlier episodes from there; or its seed."""
    if (episodes.start_hash == "").any():
        return episodes.seed.astype(str)
    seen: dict[str, int] = {}
    names = []
    for start, task in zip(episodes.start_hash.tolist(), episodes.task.tolist(), strict=True):
        start = f"{start}/{task}" if task else start
        seen[start] = seen.get(start, -1) + 1
        names.append(f"{start}/{seen[start]}")
    return np.array(names, dtype=str)


class RateOverRuns(NamedTuple):
    """A rate over evaluations of several training seeds."""

    mean: Estimate
    """Mean with Student's 95 % interval for runs, NaN for one run, within [0, 1]."""
    std: float
    """Sample standard deviation; NaN for one run."""
    num_runs: int


def rate_over_runs(evaluations: Sequence[Evaluation], outcome: SuccessName = "success_once") -> RateOverRuns:
    """Returns mean, interval and deviation of a rate over evaluations of several training seeds."""
    rates = [getattr(summarize(evaluation), outcome).value for evaluation in evaluations]
    mean = mean_interval(rates)
    std = float(np.std(rates, ddof=1)) if len(rates) > 1 else float("nan")
    return RateOverRuns(mean._replace(low=max(mean.low, 0.0), high=min(mean.high, 1.0)), std, len(rates))


def _rate(is_success: np.ndarray, start: np.ndarray) -> Estimate:
    """Returns the rate of all rows, with the width of the distinct starts: repeats of one are not independent."""
    num_distinct = len(np.unique(start))
    return wilson_interval(float(np.mean(is_success)) * num_distinct if num_distinct else 0.0, num_distinct)
