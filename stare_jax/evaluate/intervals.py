"""Confidence intervals of success rates, from counts; plain floats in and out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

Z_95 = 1.959963984540054


class Estimate(NamedTuple):
    """A rate or a difference of rates with its confidence interval; NaN where nothing was counted."""

    value: float
    low: float
    high: float


def wilson_interval(num_successes: float, num_trials: float, *, z: float = Z_95) -> Estimate:
    """Wilson's score interval of a proportion.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),    p = num_successes / num_trials

    Args:
        num_successes: in [0, num_trials]; not whole where a rate is spread over fewer distinct trials.
        num_trials: number of independent trials n.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Reference: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.

    Raises:
        ValueError: the successes are not in [0, num_trials].
    """
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"num_successes: got {num_successes}, expected 0 <= num_successes <= {num_trials}")
    if num_trials == 0:
        return Estimate(math.nan, math.nan, math.nan)
    rate = num_successes / num_trials
    centre = rate + z**2 / (2 * num_trials)
    half_width = z * math.sqrt(rate * (1 - rate) / num_trials + z**2 / (4 * num_trials**2))
    scale = 1 + z**2 / num_trials
    # The limits of 0 and n successes are exactly 0 and 1; rounding would miss them.
    low = 0.0 if num_successes == 0 else (centre - half_width) / scale
    high = 1.0 if num_successes == num_trials else (centre + half_width) / scale
    return Estimate(rate, low, high)


def mean_of_rates(rates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of independent rates, such as those of K tasks, with an interval from their own ones.

        mean(p_k) - √(Σ (p_k - l_k)²) / K,    mean(p_k) + √(Σ (u_k - p_k)²) / K

    Args:
        rates: K estimates p_k in [l_k, u_k].

    Returns:
        The estimate; NaN where a rate is NaN, since a mean without it is another number.

    Reference: Zou and Donner, Construction of confidence limits about effect measures: a general approach, Statistics
    in Medicine 2008 (the method of variance estimates recovery).
    """
    value, low, high = (np.array(column, float) for column in zip(*rates, strict=True))
    mean, number = float(value.mean()), len(rates)
    below, above = (math.sqrt(((value - limit) ** 2).sum()) / number for limit in (low, high))
    return Estimate(mean, mean - below, mean + above)


def paired_difference(num_gained: float, num_lost: float, num_pairs: float, *, z: float = Z_95) -> Estimate:
    """Tango's score interval of the difference of two proportions measured on the same pairs.

    With b pairs won only by the first, c only by the second, and d a hypothetical difference, the limits are where

        (b - c - n d) / √(n (2 q(d) + d (1 - d))) = ± z

    and q(d), the maximum-likelihood probability of a pair won only by the second, is the larger root of
    2n q² + ((2n - b + c) d - b - c) q - c d (1 - d) = 0. Unlike the normal interval it has a width, z² / (n + z²) to
    either side, where both agree on every pair.

    Args:
        num_gained: b, pairs where the first succeeds and the second fails.
        num_lost: c, pairs where the second succeeds and the first fails.
        num_pairs: n, all pairs.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Reference: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 1998.

    Raises:
        ValueError: the counts are negative or b + c exceeds n.
    """
    if min(num_gained, num_lost) < 0 or num_gained + num_lost > num_pairs:
        raise ValueError(f"num_gained, num_lost: got {num_gained}, {num_lost}, expected a sum of at most {num_pairs}")
    if num_pairs == 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = (num_gained - num_lost) / num_pairs

    def score(difference: float) -> float:
        return _tango_score(difference, num_gained, num_lost, num_pairs)

    # The score falls with the difference, from at least 0 at -1 to at most 0 at 1, and is 0 at the estimate.
    return Estimate(value, _bisect(score, z, -1.0, value), _bisect(score, -z, value, 1.0))


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Returns the mean of values with Student's interval, mean ± t_{n-1} s / √n.

    Args:
        values: n measurements, such as the rates of runs with different seeds.
        confidence: probability that the interval covers the mean of the normal distribution they come from.

    Returns:
        The estimate; the limits are NaN for one value, of which no spread can be seen.
    """
    num_values = len(values)
    if not num_values:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    if num_values == 1:
        return Estimate(mean, math.nan, math.nan)
    quantile = float(stdtrit(num_values - 1, 0.5 + confidence / 2))
    half_width = quantile * float(np.std(values, ddof=1)) / math.sqrt(num_values)
    return Estimate(mean, mean - half_width, mean + half_width)


def ratio_of_means(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Returns the ratio of two means of the same pairs, with the percentile interval of a bootstrap over the pairs.

    Args:
        numerators: n measurements, such as the steps of runs with different seeds.
        denominators: n measurements of the same pairs, > 0.
        confidence: share of the resampled ratios within the interval.
        num_resamples: resamples of n pairs with replacement.
        seed: of the resamples.

    Returns:
        The estimate; the limits are NaN for one pair.

    Raises:
        ValueError: the lengths differ.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(a) != len(b):
        raise ValueError(f"denominators: got {len(b)}, expected one for each of {len(a)} numerators")
    if not len(a):
        return Estimate(math.nan, math.nan, math.nan)
    value = float(a.mean() / b.mean())
    if len(a) == 1:
        return Estimate(value, math.nan, math.nan)
    rows = np.random.default_rng(seed).integers(len(a), size=(num_resamples, len(a)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(a[rows].mean(axis=1) / b[rows].mean(axis=1), tails)
    return Estimate(value, float(low), float(high))


def _tango_score(difference: float, num_gained: float, num_lost: float, num_pairs: float) -> float:
    b, c, n, d = num_gained, num_lost, num_pairs, difference
    linear = (2 * n - b + c) * d - b - c
    root = math.sqrt(max(0.0, linear**2 + 8 * n * c * d * (1 - d)))
    q = (root - linear) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    distance = b - c - n * d
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _bisect(falling_fn, target: float, low: float, high: float) -> float:
    """Returns the place in [low, high] where a falling function crosses `target`, or the end that is nearest to it."""
    for _ in range(60):  # halves an interval of 2 to below double precision
        middle = (low + high) / 2
        low, high = (middle, high) if falling_fn(middle) > target else (low, middle)
    return (low + high) / 2
