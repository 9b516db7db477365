import math

import numpy as np
import pytest

from stare_jax.documents import DocumentError
from stare_jax.logging import last_lines, make_writer, read_metrics, write_config
from stare_jax.report.curves import (
    CurveError,
    ends,
    first_reached,
    make_series,
    mean_curve,
    moving_mean,
    read_run,
    read_runs,
    target_at,
)


def write_lines(directory, lines, phase="ppo"):
    with make_writer(directory, tensorboard=False) as writer:
        for step, metrics in lines:
            writer(step, metrics, phase=phase)
    return directory


def line(success, steps, seconds=30.0):
    return {"env/success": success, "env/steps": steps, "time/env_s": seconds / 3, "time/update_s": 2 * seconds / 3}


def test_a_resumed_run_replaces_what_it_does_again_and_what_it_gave_up(tmp_path):
    # Killed after iteration 5, went on from the checkpoint of iteration 2, and is at 4 by now.
    lines = [(step, line(0.1, 100 * step)) for step in range(1, 6)] + [(3, line(0.7, 333)), (4, line(0.8, 444))]
    write_lines(tmp_path, lines)
    write_lines(tmp_path, [(9, line(1.0, 9))], phase="other")
    series, by_clock = make_series(last_lines(read_metrics(tmp_path), "ppo"))
    np.testing.assert_array_equal(series.iteration, [1, 2, 3, 4])
    np.testing.assert_array_equal(series.env_steps, [100, 200, 333, 444])
    np.testing.assert_array_equal(series.success, [0.1, 0.1, 0.7, 0.8])
    np.testing.assert_allclose(series.minutes, [0.5, 1.0, 1.5, 2.0])
    assert not by_clock


def test_minutes_are_those_of_the_iterations_and_of_the_clock_only_where_they_were_not_logged():
    rows = [
        {"step": 1, "wall_time": 1000.0, "env/success": 0.0, "env/steps": 10.0, "time/env_s": 6.0, "time/other_s": 6.0},
        {"step": 2, "wall_time": 9000.0, "env/success": 0.5, "env/steps": 20.0, "time/env_s": 12.0, "ppo/kl": 0.1},
    ]
    rows[1]["time/validation_s"] = 600.0  # is no training
    series, by_clock = make_series(rows)
    np.testing.assert_allclose(series.minutes, [0.2, 0.4])  # 12 s, and 12 s more; not the 8000 s between the stamps
    np.testing.assert_array_equal(series.metrics["ppo/kl"], [math.nan, 0.1])
    assert not by_clock

    del rows[1]["time/env_s"]
    series, by_clock = make_series(rows)
    np.testing.assert_allclose(series.minutes, [0, 8000 / 60])
    assert by_clock


def test_moving_mean_looks_back_and_leaves_out_what_is_not_known():
    values = np.array([1.0, 3.0, math.nan, 5.0, 9.0])
    np.testing.assert_allclose(moving_mean(values, 3), [1, 2, 2, 4, 7])
    np.testing.assert_array_equal(moving_mean(values, 1), values)
    np.testing.assert_allclose(moving_mean(values, 99), [1, 2, 2, 3, 4.5])


def test_a_target_is_reached_by_a_mean_of_whole_windows():
    success = np.array([1.0, 0.5, 0.9, 1.0, 1.0, 0.0])
    assert first_reached(success, 0.95, 3) == 4  # (0.9 + 1 + 1) / 3; the one of the first iteration is no mean
    assert first_reached(success, 0.95, 1) == 0
    assert first_reached(success, 0.97, 3) is None
    assert first_reached(success, 0.1, 7) is None  # never so many iterations
    assert first_reached(np.full(7, 0.95), 0.95, 5) == 4  # though sums are rounded


def test_validations_count_where_there_are_some():
    rows = [{"step": i + 1, "env/success": 1.0, "env/steps": 100.0 * (i + 1)} for i in range(7)]
    assert target_at(make_series(rows)[0], 0.8, 3) == 2
    for row, share in zip(rows[::2], (0.1, 0.7, 0.9, 0.5), strict=True):
        row["validation/success"] = share
    series, _ = make_series(rows)
    # The fifth iteration begins with the policy of the fourth, whose validation and the one before have a mean of 0.8.
    assert target_at(series, 0.8, 3) == 3 and series.env_steps[3] == 400
    assert target_at(series, 0.81, 3) is None
    rows[0]["validation/success"] = 0.9
    assert target_at(make_series(rows)[0], 0.8, 3) == 1  # two, never one alone


def test_mean_over_runs_where_all_of_them_are():
    one, two = (np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([5.0, 15.0]), np.array([1.0, 1.0]))
    x, y = mean_curve([one, two], num_points=3)
    np.testing.assert_allclose(x, [5, 7.5, 10])
    np.testing.assert_allclose(y, [3, 4.25, 5.5])
    assert mean_curve([one]) is None
    assert mean_curve([one, (two[0] + 20, two[1])]) is None
    assert mean_curve([one, two, (two[0], np.full(2, math.nan))]) is None  # would be the mean of other runs than named


def test_ends_are_the_first_and_last_five():
    assert ends(np.array([0, 0, 0, 0, 1, 1, 1, 1, math.nan])) == pytest.approx((0.2, 1.0))


def test_reads_who_a_run_is(tmp_path):
    directory = write_lines(tmp_path / "a", [(1, line(0.5, 7))])
    write_config(directory, {"seed": 3, "env": {"env_id": "PushCube-v1"}})
    run = read_run("A", directory, "ppo")
    assert (run.label, run.name, run.seed, run.task, run.before, run.after) == (
        "A",
        "a",
        "3",
        "PushCube-v1",
        None,
        None,
    )
    (directory / "config.json").write_text('{"env": [], "init_from": 3, "phases": []}')
    with pytest.raises(
        DocumentError,
        match=r"config.json:\n  env: got \[\], (.|\n)*phases: got \[\], exp(.|\n)*init_from: got 3",
    ):
        read_run("A", directory, "ppo")
    (directory / "config.json").unlink()
    assert read_run("A", directory, "ppo").seed == "–"


def test_tells_folders_of_one_name_apart(tmp_path):
    directories = [write_lines(tmp_path / parent / "seed_0", [(1, line(0.5, 7))]) for parent in ("x", "y")]
    assert [run.name for run in read_runs({"A": directories}, "ppo")] == ["seed_0", "seed_0 (2)"]
    assert [run.name for run in read_runs({"A": directories[:1], "B": directories[1:]}, "ppo")] == ["seed_0"] * 2
    with pytest.raises(CurveError, match="twice"):
        read_runs({"A": [directories[0], directories[0] / "../seed_0"]}, "ppo")


def test_says_what_a_run_lacks(tmp_path):
    directory = write_lines(tmp_path / "a", [(1, {"sft/loss": 1.0})], phase="sft")
    with pytest.raises(CurveError, match="phases: sft; expected some of ppo"):
        read_run("A", directory, "ppo")
    with pytest.raises(CurveError, match="no env/success and no env/steps in sft"):
        read_run("A", directory, "sft")
    write_lines(directory, [(1, line(0.5, 7))])
    (directory / "eval").mkdir()
    (directory / "eval/sft.json").write_text("{}")
    with pytest.raises(DocumentError, match="eval/sft.json:\n  info: got nothing, expected an object"):
        read_run("A", directory, "ppo")
