import json
import math

import numpy as np
import pytest

from stare_jax.evaluate.intervals import paired_difference, wilson_interval
from stare_jax.evaluate.protocol import Episodes, EvalInfo, Evaluation
from stare_jax.evaluate.summary import compare, load_evaluation, mean_and_std, save_evaluation, summarize

STAGES = ("reach", "grasp", "place")


def make_evaluation(completed, *, valid=None, start=None, seed=None, success_end=None, env_id="A-v0"):
    """An evaluation in which completing the last stage is success."""
    completed = np.asarray(completed, bool)
    num_episodes, num_stages = completed.shape
    success = completed[:, -1]
    everywhere = np.ones(num_episodes, bool)
    return Evaluation(
        EvalInfo(env_id, STAGES[:num_stages], 10, 0.0, 10 * num_episodes, 1.5),
        Episodes(
            seed=np.arange(num_episodes) if seed is None else np.asarray(seed),
            start=np.arange(num_episodes) if start is None else np.asarray(start),
            valid=everywhere if valid is None else np.asarray(valid, bool),
            success_end=success if success_end is None else np.asarray(success_end, bool),
            success_once=success,
            success_at=np.where(success, 4 + np.arange(num_episodes), 11),
            grasped=completed[:, 1],
            contacted=everywhere,
            stage_reached=np.minimum(completed.sum(axis=1), num_stages - 1),
            completed=completed,
            entered_at=np.zeros_like(completed, int),
            stage_len=np.zeros_like(completed, int),
        ),
    )


def test_conditional_stage_success():
    # reach 5 of 6; grasp 3 of those 5; place 1 of those 3. The lost episode counts nowhere.
    completed = [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    summary = summarize(make_evaluation(completed, valid=[1, 1, 1, 1, 1, 1, 0]))
    counts = [(stage.name, stage.num_completed, stage.num_given) for stage in summary.stages]
    assert counts == [("reach", 5, 6), ("grasp", 3, 5), ("place", 1, 3)]
    assert summary.stages[1].rate == wilson_interval(3, 5)
    assert summary.success_once == wilson_interval(1, 6) and summary.grasped == wilson_interval(3, 6)
    assert (summary.num_episodes, summary.num_dropped, summary.num_distinct) == (6, 1, 6)
    assert summary.median_steps == 4.0


def test_summary_of_nothing_is_nan():
    summary = summarize(make_evaluation([[0, 0, 0], [1, 0, 0]], valid=[1, 0]))
    assert math.isnan(summary.median_steps) and math.isnan(summary.stages[1].rate.value)
    assert (summary.stages[1].num_given, summary.stages[0].num_given) == (0, 1)
    nothing = summarize(make_evaluation([[1, 1, 1]], valid=[0]))
    assert math.isnan(nothing.success_once.value) and nothing.num_dropped == 1


def test_intervals_count_distinct_starts():
    # Twelve episodes from three starts: 2/3 as often as not, but no better known than three episodes tell.
    completed = [[1, 1, 1], [1, 1, 1], [0, 0, 0]] * 4
    summary = summarize(make_evaluation(completed, start=[0, 1, 2] * 4))
    assert (summary.num_episodes, summary.num_distinct) == (12, 3)
    assert summary.success_once == pytest.approx(wilson_interval(2, 3))


def test_compare_pairs_by_seed():
    won, lost = [1, 1, 1], [0, 0, 0]
    first = make_evaluation([won, won, won, lost, won], seed=[3, 1, 2, 4, 9])
    second = make_evaluation([won, lost, lost, won, lost], seed=[1, 2, 3, 4, 5])
    # Shared seeds 1 2 3 4: first 1 1 1 0, second 1 0 0 1.
    comparison = compare(first, second)
    assert (comparison.num_gained, comparison.num_lost, comparison.num_pairs) == (2, 1, 4)
    assert comparison.difference == paired_difference(2, 1, 4)
    assert compare(second, first).difference.value == -comparison.difference.value


def test_compare_leaves_out_lost_episodes_and_counts_distinct_starts():
    won, lost = [1, 1, 1], [0, 0, 0]
    first = make_evaluation([won, won, won, won], valid=[1, 1, 1, 0], start=[0, 0, 2, 3])
    second = make_evaluation([lost, lost, won, lost], valid=[1, 1, 1, 1])
    comparison = compare(first, second)
    assert (comparison.num_pairs, comparison.num_distinct) == (3, 2)
    # Two of three pairs are won; as two distinct starts that is 4/3 of 2.
    assert comparison.difference == pytest.approx(paired_difference(4 / 3, 0, 2))


def test_compare_of_identical_outcomes():
    evaluation = make_evaluation([[1, 1, 1], [0, 0, 0]] * 50)
    low, high = compare(evaluation, evaluation).difference[1:]
    assert low == pytest.approx(-0.03699, abs=1e-5) and high == pytest.approx(0.03699, abs=1e-5)


def test_compare_takes_another_outcome_and_refuses_another_task():
    first = make_evaluation([[1, 1, 1]] * 2, success_end=[1, 0])
    assert compare(first, make_evaluation([[1, 1, 1]] * 2), "success_end").difference.value == -0.5
    with pytest.raises(ValueError, match="env_id: got B-v0, expected A-v0"):
        compare(first, make_evaluation([[1, 1, 1]], env_id="B-v0"))


def test_mean_and_std_over_training_seeds():
    # Rates 0.5 and 1: mean 0.75, sample deviation √(2 · 0.25²) = 0.3536.
    evaluations = [make_evaluation([[1, 1, 1], [0, 0, 0]]), make_evaluation([[1, 1, 1]])]
    assert mean_and_std(evaluations) == pytest.approx((0.75, 0.35355), abs=1e-5)
    mean, std = mean_and_std(evaluations[:1])
    assert mean == 0.5 and math.isnan(std)


def test_files_bring_back_what_was_saved(tmp_path):
    evaluation = make_evaluation([[1, 1, 1], [0, 0, 0]], valid=[1, 0])
    path = tmp_path / "eval/sft.json"
    save_evaluation(path, evaluation, phase="sft", videos=[])
    loaded = load_evaluation(path)
    assert loaded.info == evaluation.info
    for name, got, expected in zip(Episodes._fields, loaded.episodes, evaluation.episodes, strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)
    assert str(summarize(loaded)) == str(summarize(evaluation))  # as text, because NaN differs from itself
    document = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert document["phase"] == "sft" and document["summary"]["success_once"]["value"] == 1.0
