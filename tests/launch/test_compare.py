"""The command that compares learning curves, on runs with metrics and evaluations made by hand."""

import csv
import re

import compare as command
import numpy as np
import pytest
from made_runs import NUM_ITERATIONS, make_run, save_rate
from PIL import Image

from stare_jax.evaluate.intervals import wilson_interval
from stare_jax.logging import make_writer
from stare_jax.report.comparison import Choices, make_panels, without_paths
from stare_jax.report.curves import read_run, read_runs
from stare_jax.report.figures import PALETTE


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, rise, seed in (("sta_0", 3, 0), ("sta_1", 5, 1), ("sta_2", 99, 2), ("ppo_0", 99, 0), ("ppo_1", 4, 1)):
        make_run(root / name, rise, seed)
    save_rate(root / "sta_0", "sft", 2)
    save_rate(root / "sta_0", "ppo", 9)
    make_run(root / "elsewhere", 3, 0, task="StackCube-v1")
    return root


@pytest.fixture(scope="module")
def settings(runs):
    return [
        "STA-PPO=" + ",".join(str(runs / f"sta_{seed}") for seed in range(3)),
        f"PPO={runs}/ppo_0, {runs}/ppo_1",
    ]


@pytest.fixture(scope="module")
def out(runs, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    made_by = f"/opt/bin/python launch/train.py --workdir={runs}/sta_0"
    assert command.main([*settings, f"--out={out}", "--smooth=2", f"--command={made_by}"]) == 0
    return out


def rows_of(text, first):
    """Cells of the rows of a Markdown table that begin with a cell."""
    return [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if row.startswith(f"| {first} |")]


def test_table_of_runs(out):
    rows = {row[1]: row for row in rows_of((out / "README.md").read_text(), "STA-PPO") if len(row) == 11}
    low, high = (f"{100 * x:.1f}" for x in wilson_interval(9, 10)[1:])
    # Success from iteration 3 on; the mean of two is 1 at iteration 4: 400 steps, 4 * 6 s. First five: 3, 4, 5 of 5.
    head = ["STA-PPO", "sta_0", "0", "20.0 [5.7, 51.0]", f"90.0 [{low}, {high}]"]
    assert rows["sta_0"] == [*head, "60.0", "100.0", "400", "0.4", "800", "0.8"]
    assert rows["sta_1"][2:] == ["1", "–", "–", "20.0", "80.0", "600", "0.6", "800", "0.8"]
    assert rows["sta_2"][7:9] == ["not reached", "not reached"]


def test_median_counts_a_run_that_did_not_reach_the_target_as_the_slowest(out):
    text = (out / "README.md").read_text()
    assert ["STA-PPO", "3", "2", "600", "0.6"] in rows_of(text, "STA-PPO")
    assert ["PPO", "2", "1", "not reached", "not reached"] in rows_of(text, "PPO")


def test_files_hold_commands_and_no_local_paths(out, runs):
    text = (out / "README.md").read_text()
    assert "```\n…/python launch/train.py --workdir=…/sta_0\n```" in text
    assert 'src="curves.png"' in text and "PushCube-v1" in text and "10 episodes, greedy" in text
    assert not any(str(runs) in (out / name).read_text() for name in ("README.md", "curves.csv"))


def test_numbers(out):
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    header = ["label", "run", "iteration", "env_steps", "minutes", "success"]
    assert list(rows[0]) == [*header, "ppo/approx_kl", "ppo/entropy"]
    assert len(rows) == 5 * NUM_ITERATIONS
    row = next(row for row in rows if row["run"] == "ppo_1" and row["iteration"] == "5")
    assert list(row.values()) == ["PPO", "ppo_1", "5", "500", "0.5", "1", "0.05", "-5"]


def test_figures_show_every_setting_on_light_and_dark_pages(out):
    for name, corner in (("curves.png", (255, 255, 255)), ("curves_dark.png", (0x16, 0x1B, 0x22))):
        with Image.open(out / name) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert tuple(pixels[0, 0]) == corner
        for colour in PALETTE[:2]:
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - rgb).max(axis=-1) <= 3).sum() > 1000
        third = [int(PALETTE[2][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - third).max(axis=-1) <= 3).sum() == 0


def test_panels_hold_runs_means_and_evaluations(settings):
    runs = read_runs(command.parse_settings(settings), "ppo")
    (by_steps, by_time), (kl,) = make_panels(runs, Choices(metrics=("ppo/approx_kl",), smooth=2))
    assert {label: len(curves) for label, curves in by_steps.curves.items()} == {"STA-PPO": 3, "PPO": 2}
    np.testing.assert_allclose(by_time.curves["PPO"][0].x, 0.1 * np.arange(1, 9))
    np.testing.assert_allclose(by_steps.curves["PPO"][1].smooth, [0, 0, 0, 0.5, 1, 1, 1, 1])
    assert by_steps.means["PPO"][1][-1] == 0.5 and kl.means["PPO"][1][-1] == pytest.approx(0.075)
    assert by_steps.before == {"sft": {"STA-PPO": [wilson_interval(2, 10)]}}
    assert by_steps.after == {"ppo": {"STA-PPO": [wilson_interval(9, 10)]}} and kl.before == {}


def test_prints_the_tables(settings, tmp_path, capsys):
    assert command.main([*settings, f"--out={tmp_path}", "--smooth=2"]) == 0
    printed = capsys.readouterr().out
    assert "20.0 [5.7, 51.0]" in printed and "median steps to target" in printed


@pytest.mark.parametrize("names", [["README.md"], ["curves.csv"], ["README.md", "curves.csv"], ["curves_dark.png"]])
def test_files_of_something_else_are_not_overwritten(settings, tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    assert command.main([*settings, f"--out={tmp_path}"]) == 1
    assert f"error: --out: got {tmp_path}, which has another {names[0]}" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] * len(names)


def test_minutes_of_the_clock_are_said_to_be(tmp_path):
    with make_writer(tmp_path / "old", tensorboard=False) as writer:
        for i in (1, 2):
            writer(i, {"env/success": 0.5, "env/steps": 10.0 * i}, phase="ppo")
    assert command.main([f"A={tmp_path / 'old'}", f"--out={tmp_path / 'out'}"]) == 0
    assert "pauses included: A: old" in (tmp_path / "out/README.md").read_text()


def test_runs_that_began_from_each_other_end_the_search_for_earlier_evaluations(tmp_path):
    for name, source in (("a", "b/sft"), ("b", "c/sft"), ("c", "a/sft"), ("itself", "itself/sft")):
        save_rate(make_run(tmp_path / name, 2, 0, init_from=str(tmp_path / source)), "sft", 3)
        (tmp_path / name / "sft").mkdir()
    for name in ("a", "itself"):
        curve = read_run("A", tmp_path / name, "ppo")
        assert curve.before.summary.num_episodes == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python a/b.py --x=/tmp/runs/s0/ --y=c/d", "python a/b.py --x=…/s0 --y=c/d"),
        (
            "PATH=/a/b:/c/d.e '/f/g' https://a.b/c ./h ../i ~/j 1/2",
            "PATH=…/b:…/d.e '…/g' https://a.b/c ./h ../i ~/j 1/2",
        ),
    ],
)
def test_paths_are_cut_to_their_last_part(text, expected):
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A={}/nowhere"], "nowhere, expected a run directory, but there is none"),
        (["A={}/sta_0", "--phase=tpo"], "got metrics of the phases: sft, ppo; expected some of tpo"),
        (["A="], "expected at least one run after A="),
        (["{}/sta_0"], "expected LABEL=RUN[,RUN...]"),
        (["A={}/sta_0", "A={}/sta_1"], "got the label 'A' twice"),
        (["A={0}/sta_0,{0}/sta_0"], "twice, expected each run once"),
        (["A={}/sta_0", "B={}/elsewhere"], "PushCube-v1 (A: sta_0), StackCube-v1 (B: elsewhere); expected one task"),
        (
            ["A={}/sta_0", "--metrics=ppo/entropie"],
            "metrics: got ppo/entropie; expected some of env/steps, env/success",
        ),
        (["A={}/sta_0", "--target=95"], "target: got 95, expected in (0, 1]"),
    ],
)
def test_says_what_is_wrong_in_one_line(runs, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert command.main([f"--out={out}", *(argument.format(runs) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not out.exists()
