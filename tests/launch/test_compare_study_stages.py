"""Figures 5 and 6, goals and the origin of numbers of a study's folder, on evaluations made by hand."""

import csv
import json
import re

import compare as command
import pytest
from made_runs import save_stages
from PIL import Image

from stare_jax.evaluate.intervals import Estimate, wilson_interval
from stare_jax.logging import make_writer, write_config
from stare_jax.report.study_goals import judge_ratio
from stare_jax.report.study_tables import Ratio

LIFT = "LiftPegUpright-v1"
REACHED = {
    "sft": [[4] + [0] * 9, [4] + [0] * 9],
    "grape": [[4] * 2 + [3] * 2 + [1] * 4 + [0] * 2, [4] * 2 + [1] * 8],
    "chosen": [[4] * 2 + [0] * 8, [4] * 3 + [0] * 7],
    "sta_tpo": [[4] * 6 + [1] * 4, [4] * 8 + [1] * 2],
    "sta_ppo": [[4] * 9 + [3], [4] * 10],
    "without_1": [[4] * 8 + [1] * 2] * 2,
    "without_4": [[4] * 5 + [3] * 5, [4] * 6 + [3] * 4],
}
"""method -> seed -> stages that each of ten episodes completes"""
PHASES = {"sft": "sft", "grape": "tpo", "chosen": "tpo", "sta_tpo": "tpo"}
VERSIONS = {"processor": "Abacus 7", "cpu_count": 2, "device": "1 x cpu (cpu)", "commit": "0123456789abcdef"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "runs" / "x"
    for method, of_method in REACHED.items():
        phase = PHASES.get(method, "ppo")
        for seed, reached in enumerate(of_method):
            run = folder / LIFT / method / f"seed_{seed}"
            enabled = [k != int(method[-1]) - 1 for k in range(4)] if method.startswith("without") else None
            config = {"seed": seed, "phases": [phase], "env": {"env_id": LIFT}, "stages": {"enabled": enabled}}
            write_config(run, config | {"ppo": {"seed": seed}, "init_from": f"runs/x/{LIFT}/sft/seed_{seed}/sft"})
            # Another simulator in the second run of the control: its states are no other run's.
            save_stages(run, phase, reached, hashes="other" if (method, seed) == ("chosen", 1) else "")
    run = folder / LIFT / "sft" / "seed_0"
    with make_writer(run, tensorboard=False) as writer:
        for step in (1, 2):
            writer(step, {"sft/loss": 1.0, "time/data_s": 30.0, "time/update_s": 15.0}, phase="sft")
    (run / "sft").mkdir()
    (run / "sft" / "versions.json").write_text(json.dumps(VERSIONS))
    arguments = ["--config=configs/franka_state.py:x,sft", "--config.stages.enabled=(True, False)", f"--workdir={run}"]
    (run.parent / "seed_0.json").write_text(json.dumps({"arguments": arguments, "pid": 1}))
    return folder


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert command.main([f"--study={folder}", f"--out={out}", "--command=made on a rainy day"]) == 0
    return out


def rows_under(out, title):
    """First cell -> the other cells, of the table under a title."""
    text = re.split(r"\n#+ ", (out / "README.md").read_text().split(f"# {title}\n")[1])[0]
    rows = [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if row.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def rate(reached, given):
    value, low, high = (100 * x for x in wilson_interval(reached, given))
    return f"{value:.1f} [{low:.1f}, {high:.1f}] ({reached}/{given})"


def test_stages_are_given_the_stage_before_over_the_episodes_of_all_seeds(out):
    rows = rows_under(out, "Stages")
    assert rows["P(stage \\"][:1] == ["the stage before), %"]  # a cell with a bar in it
    assert rows["grape"][:4] == [rate(18, 20), rate(6, 18), rate(6, 6), rate(4, 6)]
    assert rows["grape"][4].startswith("20.0 [") and rows["grape"][6:] == ["0, 1", "10"]
    assert rows["sta_tpo"][4].startswith("70.0 [")  # of 60 and 80 %
    with (out / "stages.csv").open() as file:
        (row,) = [r for r in csv.DictReader(file) if (r["method"], r["outcome"]) == ("grape", "grasp")]
    assert (row["reached"], row["given"], row["value"], row["seeds"]) == ("6", "18", "0.333333", "2")


def test_differences_are_paired_by_seed_and_state(out):
    """Grasp: 14/20 - 6/18; success: 14/20 - 4/20. One run of the control is from the others' states: 6/10 - 2/10."""
    rows = rows_under(out, "Differences")
    assert rows["sta_tpo − grape"][1].startswith("+36.7 [") and rows["sta_tpo − grape"][4].startswith("+50.0 [")
    assert rows["sta_tpo − grape"][-1] == "2"
    assert rows["sta_tpo − chosen"][4].startswith("+40.0 [")
    assert rows["sta_tpo − chosen"][-1].startswith("1; others not paired: initial states in common")
    assert set(rows) >= {"chosen − grape", "without_4 − sta_ppo"} and "grape − chosen" not in rows
    with (out / "differences.csv").open() as file:
        (row,) = [r for r in csv.DictReader(file) if (r["method"], r["outcome"]) == ("without_4", "upright")]
    assert float(row["value"]) == pytest.approx(11 / 20 - 19 / 20) and float(row["high"]) < 0


def test_toggles_are_told_by_what_is_turned_off(out):
    rows = rows_under(out, "Stage toggles")
    assert rows["none (sta_ppo)"][2:4] == ["–", "–"]
    assert rows["reach (without_1)"][2].startswith("-15.0 [") and rows["reach (without_1)"][4] == "moderate drop"
    assert rows["upright (without_4)"][2].startswith("-40.0 [") and "20 %" in rows["upright (without_4)"][4]


def test_goals_say_what_was_wanted_and_what_was_measured(out):
    rows = rows_under(out, "Goals")
    assert rows["success at any step, sta_tpo − grape, points"][-2:] == ["lower bound above 0", "yes"]
    pattern = rows["success at any step without a stage's signal, points"]
    assert "upright -40.0 [" in pattern[1] and pattern[-2:] == ["upright the largest drop, 20 or more", "yes"]


@pytest.mark.parametrize(
    ("estimate", "is_cut", "expected"),
    [
        ((0.4, 0.3, 0.7), (False, False), "yes"),
        ((0.4, 0.3, 0.8), (False, False), "no"),
        ((0.6, 0.5, 0.7), (False, False), "no"),
        ((0.4, 0.3, 0.7), (False, True), "yes"),  # the true ratio is smaller still
        ((0.6, 0.5, 0.9), (False, True), "not decided"),
        ((0.6, 0.5, 0.9), (True, False), "no"),  # the true ratio is larger still
        ((0.4, 0.3, 0.7), (True, False), "not decided"),
        ((0.4, float("nan"), float("nan")), (False, False), "not decided"),
    ],
)
def test_a_bound_on_a_ratio_meets_a_goal_where_it_must(estimate, is_cut, expected):
    assert judge_ratio(Ratio(Estimate(*estimate), is_cut, 3), 0.5, 0.75) == expected


def test_numbers_tell_how_they_were_made(out):
    text = (out / "README.md").read_text()
    assert (
        "*Seeds 0, 1; 10 episodes a run, greedy. Commands, machines, times: [below](#how-these-numbers-were-made).*"
        in text
    )
    made = rows_under(out, "How these numbers were made")
    day = made["sft"][5]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d( to \d{4}-\d\d-\d\d)?", day)
    assert made["sft"] == [LIFT, "0, 1", "10", "1.5", "2.0", day, "1"]  # 2 steps of 45 seconds; 120 seconds
    assert made["grape"] == [LIFT, "0, 1", "10", "–", "2.0", "–", "–"]
    assert "1. Abacus 7, 2 cores, 1 x cpu (cpu), commit 0123456789" in text
    assert "python launch/compare.py --study=…/x --out=…/" in text and "made on a rainy day" in text
    command = "python launch/train.py --config=configs/franka_state.py:x,sft '--config.stages.enabled=(True, False)' "
    assert command + "--workdir=…/seed_0" in text


def test_pictures_are_there_for_light_and_dark_pages(out):
    for name in ("stages", "toggles"):
        with Image.open(out / LIFT / f"{name}.png") as light, Image.open(out / LIFT / f"{name}_dark.png") as dark:
            assert light.size == dark.size
        assert f'srcset="{LIFT}/{name}_dark.png"' in (out / "README.md").read_text()
