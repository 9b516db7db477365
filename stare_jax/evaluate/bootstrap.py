"""Interquartile means over runs, and bootstrap intervals of comparisons that are paired by seed.

Reference: Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, NeurIPS 2021
(arXiv:2108.13264).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from stare_jax.evaluate.intervals import Estimate


def interquartile_mean(values: np.ndarray) -> float:
    """Returns the mean of the middle half of all values.

    Where a quarter of them is no whole number, the two values at the borders count in part. Infinities, of runs that
    never got there, are the largest values; the mean is infinite where one is in the middle half.

    Args:
        values: numbers, in any shape; infinite ones are allowed, NaN is not.

    Raises:
        ValueError: there is no value, or one is NaN.
    """
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    if not len(ordered) or np.isnan(ordered[-1]):
        raise ValueError(f"values: got {'a NaN' if len(ordered) else 'none'}, expected at least one number")
    edges = np.linspace(0.0, 1.0, len(ordered) + 1)
    share = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    counts = share > 1e-12
    return float(np.sum(ordered[counts] * share[counts]) / np.sum(share[counts]))


def bootstrap_interval(
    statistic: Callable[[Sequence[np.ndarray]], float],
    strata: Sequence[np.ndarray],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Returns a statistic of runs with its percentile bootstrap interval, runs drawn anew within each stratum.

    A row of a stratum is a seed. A comparison of methods is paired where the row holds what every method reached with
    that seed: rows are drawn as they are.

    Args:
        statistic: of one array `[R_i, ...]` for each stratum, such as a task; may be infinite.
        strata: arrays `[R_i, ...]` of R_i runs.
        num_resamples: number of times that rows are drawn.
        confidence: probability that the interval covers the statistic of the distribution that runs come from.
        seed: of the draws.

    Returns:
        The estimate; a limit is NaN where the statistic of a resample is.
    """
    rng = np.random.default_rng(seed)
    strata = [np.asarray(rows) for rows in strata]
    drawn = [statistic([rows[rng.integers(0, len(rows), len(rows))] for rows in strata]) for _ in range(num_resamples)]
    tail = (1.0 - confidence) / 2
    return Estimate(float(statistic(strata)), _quantile(drawn, tail), _quantile(drawn, 1.0 - tail))


def ratio_intervals(
    strata: Sequence[np.ndarray], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> list[Estimate]:
    """Returns means over strata of ratios of sums, each with its percentile bootstrap interval, rows drawn anew.

        mean_i (Σ_r x_irk / Σ_r n_ir),    k = 1 .. K

    It is `bootstrap_interval` of such statistics, all of the same draws, without a call for each of them.

    Args:
        strata: arrays `[R_i, K + 1]`: of every row the sums x_ir1 .. x_irK and, last, the number n_ir > 0 that they are
            over, such as the episodes of a start.
        num_resamples, confidence, seed: as for `bootstrap_interval`.

    Returns:
        K estimates.
    """
    rng = np.random.default_rng(seed)
    drawn = [rows[rng.integers(0, len(rows), (num_resamples, len(rows)))].sum(axis=1) for rows in strata]
    values, resampled = (
        np.mean([sums[..., :-1] / sums[..., -1:] for sums in of_strata], axis=0)
        for of_strata in ([rows.sum(axis=0) for rows in strata], drawn)
    )
    tail = (1.0 - confidence) / 2
    limits = [[_quantile(column, at) for at in (tail, 1.0 - tail)] for column in resampled.T]
    return [Estimate(float(value), *pair) for value, pair in zip(values, limits, strict=True)]


def nested_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    runs: Sequence[np.ndarray],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Estimate]:
    """Returns statistics of totals over runs, with percentile intervals of a bootstrap of two levels.

    Runs are drawn anew, and in each of them its rows, so the intervals cover chance among training seeds and among
    episodes; of a single run, among episodes alone. A comparison is paired where a row holds what both sides did.

    Args:
        statistic: totals `[...]`, the sum of all rows of all runs -> `[M]`.
        runs: arrays `[R_i, ...]` of R_i rows, one a run, at least one.
        num_resamples: number of times that runs and rows are drawn.
        confidence: share of the resampled statistics within the interval.
        seed: of the draws.

    Returns:
        M estimates; a limit is NaN where the statistic of a resample is.
    """
    rng = np.random.default_rng(seed)
    runs = [np.asarray(rows, np.float64) for rows in runs]

    def draw_total() -> np.ndarray:
        picked = [runs[i] for i in rng.integers(0, len(runs), len(runs))]
        return sum(np.tensordot(rng.multinomial(len(r), np.full(len(r), 1 / len(r))), r, 1) for r in picked)

    drawn = np.array([statistic(draw_total()) for _ in range(num_resamples)])
    tail = (1.0 - confidence) / 2
    return [
        Estimate(float(value), _quantile(column, tail), _quantile(column, 1.0 - tail))
        for value, column in zip(statistic(sum(rows.sum(axis=0) for rows in runs)), drawn.T, strict=True)
    ]


def _quantile(values: Sequence[float], probability: float) -> float:
    """Returns an order statistic: between an infinite value and another there is nothing to interpolate."""
    ordered = np.sort(np.asarray(values, np.float64))
    if np.isnan(ordered[-1]):
        return math.nan
    return float(ordered[round(probability * (len(ordered) - 1))])
