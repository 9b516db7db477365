"""Stages and success over the runs of a method, and differences of two methods, paired by seed and initial state."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stare_jax.evaluate.bootstrap import nested_interval
from stare_jax.evaluate.episodes import Episodes, take
from stare_jax.evaluate.intervals import Estimate, wilson_interval
from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.summary import given_stages, paired_episodes
from stare_jax.types import Array


class Marks(NamedTuple):
    """Outcomes of `E` episodes: the K stages, success at any step, success at the end, in this order."""

    reached: Array
    """bool `[E, K + 2]`; only where it was given."""
    given: Array
    """bool `[E, K + 2]`: the stage before is completed; True of success, whose rate is of all episodes."""
    start: Array
    """int32 `[E]`, equal for episodes from one initial state."""


class PooledRate(NamedTuple):
    """A rate of the episodes of several runs together."""

    num_reached: int
    num_given: int
    rate: Estimate


def marks_of(episodes: Episodes) -> Marks:
    """Returns the outcomes of the episodes that are valid."""
    counted = take(episodes, episodes.valid)
    given = given_stages(counted.completed)
    success = np.stack([counted.success_once, counted.success_end], axis=1)
    reached = np.concatenate([counted.completed & given, success], axis=1)
    return Marks(reached, np.concatenate([given, np.ones_like(success)], axis=1), counted.start)


def pooled_rates(evaluations: Sequence[Evaluation]) -> list[PooledRate]:
    """Returns P(stage | the stage before), K rates, and the two rates of success, of all episodes of several runs.

    The intervals are Wilson's, for the number of distinct initial states of each run: they cover chance among episodes
    and not among training seeds.

    Args:
        evaluations: one a run, at least one, of the same task.
    """
    parts = [marks_of(evaluation.episodes) for evaluation in evaluations]
    rates = []
    for column in range(parts[0].given.shape[1]):
        given = [part.given[:, column] for part in parts]
        num_given = int(sum(rows.sum() for rows in given))
        num_reached = int(sum(part.reached[:, column].sum() for part in parts))
        num_distinct = sum(len(np.unique(part.start[rows])) for part, rows in zip(parts, given, strict=True))
        share = num_reached / num_given if num_given else 0.0
        rates.append(PooledRate(num_reached, num_given, wilson_interval(share * num_distinct, num_distinct)))
    return rates


def paired_changes(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> list[Estimate]:
    """Returns the rates of one method minus those of another, `pooled_rates` of each, with 95 % bootstrap intervals.

    Pairs of runs are drawn anew, and in each of them the initial states that both runs have.

    Args:
        pairs: (run of the first method, run of the other) of each training seed, at least one; only episodes from
            initial states that both have are counted.

    Returns:
        K + 2 differences in [-1, 1]; NaN where one side, or one resample of it, never got to the stage before.

    Raises:
        PairingError: two evaluations have another protocol, or no initial state in common.
    """
    counts = [_counts(*map(marks_of, paired_episodes(*pair))) for pair in pairs]
    return nested_interval(_differences, counts)


def _counts(first: Marks, second: Marks) -> np.ndarray:
    """Returns the counts (reached, given, reached by the other, given to the other) of each start, `[S, 4, K + 2]`."""
    of_episodes = np.stack([first.reached, first.given, second.reached, second.given], axis=1).astype(np.int64)
    starts, places = np.unique(first.start, return_inverse=True)
    counts = np.zeros((len(starts), *of_episodes.shape[1:]), np.int64)
    np.add.at(counts, places, of_episodes)
    return counts


def _differences(totals: np.ndarray) -> np.ndarray:
    """Returns reached / given of the one less that of the other, `[K + 2]`; NaN where nothing was given."""
    reached, given, other_reached, other_given = totals
    is_known = (given > 0) & (other_given > 0)
    ratios = reached / np.maximum(given, 1) - other_reached / np.maximum(other_given, 1)
    return np.where(is_known, ratios, np.nan)
