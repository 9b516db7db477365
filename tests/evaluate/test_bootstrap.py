"""Interquartile means and bootstrap intervals against hand-computed and simulated values."""

import math

import numpy as np
import pytest

from stare_jax.evaluate.bootstrap import bootstrap_interval, interquartile_mean, ratio_intervals


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert interquartile_mean(np.arange(8)) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean(np.array([[7.0, 1.0], [100.0, 3.0]])) == pytest.approx(5.0)
    # Of six values the second and the fifth count half: (1/2 · 1 + 2 + 3 + 1/2 · 10) / 3.
    assert interquartile_mean([0, 1, 2, 3, 10, 50]) == pytest.approx(3.5)
    assert interquartile_mean([4.0]) == 4.0


def test_runs_that_never_got_there_count_as_the_largest():
    assert interquartile_mean([1.0, 2.0, 3.0, math.inf]) == 2.5
    assert interquartile_mean([1.0, 2.0, math.inf, math.inf]) == math.inf
    with pytest.raises(ValueError, match="got a NaN"):
        interquartile_mean([1.0, math.nan])
    with pytest.raises(ValueError, match="got none"):
        interquartile_mean([])


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap_interval(lambda s: s[0].mean(), [rng.normal(3.0, 1.0, 40)], num_resamples=300, seed=trial)
        hits += interval.low <= 3.0 <= interval.high
    # 95 % nominally; percentile intervals of 40 values cover slightly less. Three standard errors are 5 points.
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_removes_what_seeds_have_in_common():
    rng = np.random.default_rng(1)
    luck = rng.normal(0.0, 10.0, (30, 1))
    rows = luck + np.array([0.0, 1.0]) + rng.normal(0.0, 0.1, (30, 2))

    def difference(strata):
        return strata[0][:, 1].mean() - strata[0][:, 0].mean()

    interval = bootstrap_interval(difference, [rows])
    assert interval.low == pytest.approx(1.0, abs=0.15) and interval.high == pytest.approx(1.0, abs=0.15)
    assert interval.low < interval.value < interval.high


def test_rows_are_drawn_within_their_stratum():
    easy, hard = np.zeros(10), np.ones(20)
    interval = bootstrap_interval(lambda strata: np.concatenate(strata).mean(), [easy, hard])
    # Two thirds of all rows are hard ones, in every resample.
    assert interval.low == pytest.approx(2 / 3) and interval.high == pytest.approx(2 / 3)


def test_infinite_statistics_make_infinite_limits():
    rows = np.array([1.0] * 8 + [math.inf] * 4)
    interval = bootstrap_interval(lambda strata: interquartile_mean(strata[0]), [rows])
    assert interval.low == 1.0 and interval.high == math.inf


def test_ratios_of_sums_are_those_of_the_general_bootstrap():
    """Two strata; a row holds two sums and the number that they are over."""
    rng = np.random.default_rng(4)
    strata = [np.column_stack([rng.uniform(-1, 1, (n, 2)), rng.integers(1, 5, n)]) for n in (7, 12)]
    for k, estimate in enumerate(ratio_intervals(strata, num_resamples=4000)):
        ratio = lambda rows, k=k: np.mean([part[:, k].sum() / part[:, 2].sum() for part in rows])  # noqa: E731
        expected = bootstrap_interval(ratio, strata, num_resamples=4000, seed=1)
        assert estimate.value == pytest.approx(expected.value)
        np.testing.assert_allclose(estimate, expected, atol=0.02)
