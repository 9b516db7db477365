"""Rates over the runs of a method, and paired differences of two, against numbers counted by hand."""

import math

import numpy as np
import pytest

from stare_jax.evaluate.bootstrap import nested_interval
from stare_jax.evaluate.episodes import Episodes
from stare_jax.evaluate.intervals import wilson_interval
from stare_jax.evaluate.over_runs import paired_changes, pooled_rates
from stare_jax.evaluate.protocol import EvalInfo, Evaluation
from stare_jax.evaluate.summary import PairingError


def evaluation(reached, *, starts=None, end=None, valid=None, **info):
    """Episode e completes `reached[e]` of two stages and succeeds with both; it begins in state `starts[e]`."""
    reached, numbers = np.array(reached), np.arange(len(reached))
    starts = numbers if starts is None else np.array(starts)
    fields = dict.fromkeys(Episodes._fields, numbers)
    fields |= {
        "start": np.array([starts.tolist().index(s) for s in starts]),
        "start_hash": starts.astype(str),
        "valid": np.ones(len(reached), bool) if valid is None else np.array(valid),
        "success_once": reached == 2,
        "success_end": reached == 2 if end is None else np.array(end),
        "completed": reached[:, None] > np.arange(2),
        "task": 0 * numbers,
    }
    return Evaluation(EvalInfo("x", ("near", "goal"), 5, 0.0, 10, 1.0)._replace(**info), Episodes(**fields))


def test_rates_are_of_all_episodes_together():
    """Near: 3 of 4 and 1 of 2; the goal: 1 of those 3 and 1 of that 1; an episode that was lost counts nowhere."""
    first = evaluation([2, 1, 1, 0], end=[False] * 4)
    rates = pooled_rates([first, evaluation([2, 0, 2], valid=[True, True, False])])
    assert [rate[:2] for rate in rates] == [(4, 6), (2, 4), (2, 6), (1, 6)]
    assert [rate.rate for rate in rates] == [wilson_interval(*rate[:2]) for rate in rates]


def test_repeats_of_a_start_are_one_and_equal_starts_of_two_runs_are_two():
    """Two runs from two states, each played twice: 8 episodes are as wide as 4; the goal is given from one of two."""
    run = evaluation([2, 2, 0, 0], starts=[7, 7, 8, 8])
    near, goal = pooled_rates([run, run])[:2]
    assert near == (4, 8, wilson_interval(2, 4)) and goal == (4, 4, wilson_interval(2, 2))


def test_a_stage_that_nobody_got_to_has_no_rate():
    rate = pooled_rates([evaluation([0, 0])])[1]
    assert rate[:2] == (0, 0) and math.isnan(rate.rate.value)


def test_differences_are_over_the_starts_that_both_runs_have():
    """First pair, states 1 to 3: near 3 of 3 against 1 of 3, goal 2 of 3 against 0 of 1; second pair, two states: near
    2 of 2 against 1 of 2, goal 0 of 2 against 1 of 1. In all near 5/5 - 2/5, goal 2/5 - 1/2, success 2/5 - 1/5."""
    pairs = [
        (evaluation([0, 2, 2, 1]), evaluation([1, 0, 0, 2], starts=[1, 2, 3, 9])),
        (evaluation([1, 1]), evaluation([0, 2])),
    ]
    near, goal, once, end = paired_changes(pairs)
    assert [near.value, goal.value, once.value] == pytest.approx([0.6, -0.1, 0.2]) and end == once
    assert near.low < 0.6 < near.high <= 1 and -1 <= once.low < 0.2 < once.high
    assert all(map(math.isnan, goal[1:]))  # in some resamples the other never got near


def test_what_never_varies_has_no_width_and_other_protocols_are_refused():
    always, never = evaluation([2] * 5), evaluation([0] * 5)
    near, goal, *success = paired_changes([(always, never), (always, never)])
    assert near == success[0] == (1, 1, 1) and math.isnan(goal.value)
    with pytest.raises(PairingError, match="horizon: got 9, expected 5"):
        paired_changes([(always, evaluation([0] * 5, horizon=9))])


def test_both_levels_of_chance_are_in_the_interval():
    """Two runs, all zeros and all ones: only the draw of runs varies, to means of 0, 1/2 and 1. One run of a zero and a
    one: only its rows vary."""
    mean = lambda totals: totals[:1] / totals[1:]  # noqa: E731
    rows = [np.array([[value, 1.0]] * 4) for value in (0.0, 1.0)]
    assert nested_interval(mean, rows) == [(0.5, 0.0, 1.0)]
    assert nested_interval(mean, rows[:1]) == [(0.0, 0.0, 0.0)]
    assert nested_interval(mean, [np.array([[0.0, 1.0], [1.0, 1.0]])]) == [(0.5, 0.0, 1.0)]
