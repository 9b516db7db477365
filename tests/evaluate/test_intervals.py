import math

import pytest

from stare_jax.evaluate.intervals import (
    Z_95,
    Estimate,
    mean_interval,
    mean_of_rates,
    paired_difference,
    ratio_of_means,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_intervals(successes, trials, low, high):
    estimate = wilson_interval(successes, trials)
    assert estimate.value == successes / trials
    assert estimate.low == pytest.approx(low, abs=5e-5)
    assert estimate.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_symmetric_and_closed_at_the_ends():
    few, many = wilson_interval(30, 100), wilson_interval(70, 100)
    assert many.low == pytest.approx(1 - few.high) and many.high == pytest.approx(1 - few.low)
    # p = 1: the lower limit is n / (n + z²).
    full = wilson_interval(100, 100)
    assert full.low == pytest.approx(100 / (100 + Z_95**2)) and full.high == 1.0
    assert all(math.isnan(x) for x in wilson_interval(0, 0))


def test_wilson_accepts_a_rate_spread_over_distinct_trials():
    # 60 % of 288 episodes that only have 24 distinct starts is as uncertain as 14.4 of 24.
    assert wilson_interval(14.4, 24).value == pytest.approx(0.6)
    assert wilson_interval(14.4, 24).low < wilson_interval(172.8, 288).low


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match=r"num_successes: got 5, expected 0 <= num_successes <= 4"):
        wilson_interval(5, 4)


def test_paired_difference_matches_a_published_interval():
    # Bentur et al. 2009, airway hyper-responsiveness before and after transplantation: b = 1, c = 7, n = 21, the
    # Tango interval given by Fagerland, Lydersen and Laake, Statistics in Medicine 2014: -0.517 to -0.026.
    estimate = paired_difference(1, 7, 21)
    assert estimate.value == pytest.approx(-6 / 21)
    assert estimate.low == pytest.approx(-0.517, abs=5e-4)
    assert estimate.high == pytest.approx(-0.026, abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "pairs"), [(12, 5, 100), (0, 9, 40), (3, 3, 24), (40, 20, 160)])
def test_paired_limits_solve_the_score_equation(gained, lost, pairs):
    """The nuisance probability is found here by searching the trinomial likelihood instead of solving its equation."""

    def log_likelihood(q, difference):
        terms = [(gained, q + difference), (lost, q), (pairs - gained - lost, 1 - 2 * q - difference)]
        return sum(count * math.log(p) if p > 0 else (-math.inf if count else 0.0) for count, p in terms)

    def score(difference):
        low, high = max(0.0, -difference), (1 - difference) / 2
        for _ in range(200):  # ternary search: the likelihood is concave in q
            third = (high - low) / 3
            if log_likelihood(low + third, difference) < log_likelihood(high - third, difference):
                low += third
            else:
                high -= third
        q = (low + high) / 2
        variance = pairs * (2 * q + difference * (1 - difference))
        return (gained - lost - pairs * difference) / math.sqrt(variance)

    estimate = paired_difference(gained, lost, pairs)
    assert score(estimate.low) == pytest.approx(Z_95, abs=1e-3)
    assert score(estimate.high) == pytest.approx(-Z_95, abs=1e-3)


def test_paired_difference_of_identical_outcomes_keeps_a_width():
    # b = c = 0: q = 0 where d >= 0, so n d / √(n d (1 - d)) = z, hence d = z² / (n + z²).
    estimate = paired_difference(0, 0, 100)
    assert estimate.value == 0.0
    assert estimate.high == pytest.approx(Z_95**2 / (100 + Z_95**2)) == pytest.approx(0.03699, abs=1e-5)
    assert estimate.low == pytest.approx(-estimate.high)


def test_paired_difference_at_the_ends_and_exchanged():
    assert paired_difference(50, 0, 50).high == pytest.approx(1.0)
    assert paired_difference(0, 50, 50).low == pytest.approx(-1.0)
    forward, backward = paired_difference(9, 4, 60), paired_difference(4, 9, 60)
    assert forward.low == pytest.approx(-backward.high) and forward.high == pytest.approx(-backward.low)
    assert all(math.isnan(x) for x in paired_difference(0, 0, 0))


def test_paired_difference_covers_the_truth():
    """Exact coverage at n = 30, by enumeration of all outcomes, is near 95 %."""
    n = 30
    for p_gained, p_lost in [(0.1, 0.1), (0.2, 0.05), (0.02, 0.02)]:
        p_tie = 1 - p_gained - p_lost
        coverage = 0.0
        for b in range(n + 1):
            for c in range(n + 1 - b):
                ways = math.comb(n, b) * math.comb(n - b, c)
                probability = ways * p_gained**b * p_lost**c * p_tie ** (n - b - c)
                estimate = paired_difference(b, c, n)
                coverage += probability * (estimate.low <= p_gained - p_lost <= estimate.high)
        assert coverage > 0.93


def test_paired_difference_refuses_impossible_counts():
    with pytest.raises(ValueError, match="expected a sum of at most 4"):
        paired_difference(3, 2, 4)


def test_mean_interval_is_students():
    # t_{0.975} is 4.3027 for 2 degrees of freedom; mean 4, s = 2: 4.3027 * 2 / sqrt(3) = 4.9683.
    estimate = mean_interval([2.0, 4.0, 6.0])
    assert estimate == pytest.approx((4.0, 4.0 - 4.9683, 4.0 + 4.9683), abs=1e-4)
    assert mean_interval([0.5]).value == 0.5 and math.isnan(mean_interval([0.5]).low)
    assert all(math.isnan(x) for x in mean_interval([]))


def test_ratio_of_means_resamples_pairs():
    # Of pairs (1, 2) and (3, 2) a resample has both once (ratio 1), the first twice (1/2) or the second twice (3/2).
    estimate = ratio_of_means([1.0, 3.0], [2.0, 2.0])
    assert estimate == (1.0, 0.5, 1.5)
    assert ratio_of_means([1.0, 3.0], [2.0, 2.0], confidence=0.4) == (1.0, 1.0, 1.0)  # half of them are the first kind
    # What pairs have in common is in no interval: every pair has the ratio 2.
    assert ratio_of_means([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_of_means([3.0], [4.0]).value == 0.75 and math.isnan(ratio_of_means([3.0], [4.0]).high)
    assert math.isnan(ratio_of_means([], []).value)
    with pytest.raises(ValueError, match="denominators: got 1, expected one for each of 2"):
        ratio_of_means([1.0, 2.0], [1.0])


def test_a_mean_of_rates_has_the_interval_of_its_parts():
    # Distances to the lower limits 0.3 and 0.4, to the upper ones 0.12 and 0.05: roots of 0.25 and 0.0169, halved.
    got = mean_of_rates([Estimate(0.5, 0.2, 0.62), Estimate(0.9, 0.5, 0.95)])
    assert got == pytest.approx(Estimate(0.7, 0.7 - 0.5 / 2, 0.7 + 0.13 / 2))
    alone = wilson_interval(7, 20)
    assert mean_of_rates([alone]) == pytest.approx(alone)
    # Four tasks alike are as well known as one with four times the episodes, but for Wilson's bias to the middle.
    four, one = mean_of_rates([wilson_interval(140, 200)] * 4), wilson_interval(560, 800)
    assert four.value == one.value and four.high - four.low == pytest.approx(one.high - one.low, rel=0.01)
    assert all(math.isnan(x) for x in mean_of_rates([alone, wilson_interval(0, 0)]))
