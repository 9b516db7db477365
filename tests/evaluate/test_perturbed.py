"""Perturbed against undisturbed evaluations: numbers by hand, the files of a policy, the table of a study."""

import csv

import numpy as np
import pytest
from PIL import Image
from test_summary import TASKS, make_evaluation

from stare_jax.evaluate.films import Film
from stare_jax.evaluate.intervals import wilson_interval
from stare_jax.evaluate.perturbed import against_undisturbed
from stare_jax.evaluate.record import load_evaluation, save_evaluation
from stare_jax.evaluate.summary import PairingError, pairing_obstacle
from stare_jax.logging import write_config
from stare_jax.report.perturbed import file_name, outdated, perturbed_table, write_perturbed, write_seen
from stare_jax.report.perturbed_study import write_perturbed_study
from stare_jax.report.study_runs import find_runs
from stare_jax.types import Signals

WON, LOST = [1, 1, 1], [0, 0, 0]


def evaluation(outcomes, perturbation="", **changes):
    """Success of the seeds 0, 1, ..; with a perturbation each of them begins in a state of its own."""
    moved = {"start_hash": [f"{perturbation}{n}" for n in range(len(outcomes))]} if perturbation else {}
    rows = [WON if won else LOST for won in outcomes]
    return make_evaluation(
        rows, perturbation=perturbation, **{"checkpoint": "ppo/1/ab", "horizon": 30} | moved | changes
    )


def test_differences_are_paired_by_seed_whatever_the_starts_are():
    """Of seeds 0 to 3 without: 1 1 1 0; with: 1 0 0 0, its rows in another order; seed 4 is of one side alone."""
    usual = evaluation([1, 1, 1, 0])
    light = evaluation([0, 0, 0, 1, 1], "vision/light", seed=[3, 2, 1, 0, 4])
    found = against_undisturbed([light], usual)
    assert (found.rate.value, found.difference.value, found.num_pairs) == (0.25, -0.5, 4)
    assert found.difference.low == -1.0 and found.difference.high <= 0.0  # no seed was gained
    lost = evaluation([1, 1, 1, 1], "vision/light", valid=[1, 0, 1, 1])
    assert against_undisturbed([lost], usual).num_pairs == 3


def test_the_mean_of_an_axis_is_over_its_perturbations():
    usual = evaluation([1, 1, 0, 0])
    both = [evaluation([1, 1, 1, 0], "vision/light"), evaluation([1, 0, 0, 0], "vision/table")]
    found = against_undisturbed(both, usual)
    assert (found.rate.value, found.difference.value) == (0.5, 0.0)
    same = against_undisturbed([evaluation([1, 1, 0, 0], "vision/light")], usual)
    assert tuple(same.difference) == (0.0, 0.0, 0.0)


def test_repeats_of_a_start_are_drawn_together():
    """Four starts, each played eight times with the same end: the interval is that of four pairs, not of 32."""
    ends, starts = np.repeat([1, 1, 1, 0], 8), np.repeat([0, 8, 16, 24], 8)
    usual = evaluation(np.ones(32, int), start=starts)
    repeated = against_undisturbed([evaluation(ends, "vision/light", start=starts)], usual).difference
    four = against_undisturbed([evaluation([1, 1, 1, 0], "vision/light")], evaluation([1, 1, 1, 1])).difference
    assert tuple(repeated) == tuple(four)
    apart = against_undisturbed([evaluation(ends, "vision/light")], evaluation(np.ones(32, int))).difference
    assert apart.high - apart.low < 0.5 * (four.high - four.low)


def test_tasks_count_alike():
    """The first task loses 1 of 2 and has as many again; the second loses none of 4."""
    several = {"task": [0, 1, 0, 1, 1, 1], "seed": [0, 0, 1, 1, 2, 3], "env_id": "A-v0+B-v0", "tasks": TASKS}
    usual, light = evaluation([1] * 6, **several), evaluation([0, 1, 1, 1, 1, 1], "vision/light", **several)
    assert against_undisturbed([light], usual).difference.value == -0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "sft/1/cd"}, "checkpoint: got sft/1/cd, expected ppo/1/ab"),
        ({"env_id": "B-v0"}, "env_id: got B-v0, expected A-v0"),
        ({"backend": "cuda"}, "backend: got cuda, expected cpu"),
        ({"seed": [8, 9]}, "seeds: got none in common"),
    ],
)
def test_another_policy_or_protocol_is_refused(changes, message):
    with pytest.raises(PairingError, match=message):
        against_undisturbed([evaluation([1, 0], "vision/light", **changes)], evaluation([1, 0]))


def test_a_perturbed_evaluation_is_not_taken_for_another():
    usual, light = evaluation([1, 0]), evaluation([1, 0], "vision/light", start_hash=["0", "1"])
    assert pairing_obstacle(usual, light) == "perturbation none against vision/light"
    with pytest.raises(PairingError, match="perturbation: got vision/light, expected none of the undisturbed"):
        against_undisturbed([light], light)


@pytest.fixture
def folder(tmp_path):
    """The files of a policy: undisturbed 8 of 10, in the light 6, at the table 4, moved 10."""
    for name, number in {"": 8, "vision/light": 6, "vision/table": 4, "execution/object_moved": 10}.items():
        save(tmp_path, evaluation(np.arange(10) < number, name))
    return tmp_path


def save(folder, one):
    name = file_name(one.info.perturbation)
    save_evaluation(folder / f"eval/{name}.json", one, phase=name)


def film_of(frames):
    ways = {name: np.linspace(0, 0.1, 8)[:, None] * np.ones(3) for name in ("tcp_pos", "obj_pos", "goal_pos")}
    signals = Signals(*(ways.get(name, np.zeros(8, bool)) for name in Signals._fields))
    return Film(0, signals, np.ones(8, bool), frames)


def test_table_and_files_of_a_policy(folder, capsys):
    red, green = np.zeros((8, 16, 16, 3), np.uint8), np.zeros((8, 16, 16, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    for name, frames in {"": red, "vision/light": green, "vision/table": None}.items():
        write_seen(folder, name, [film_of(frames)], caption="push it")
    path = write_perturbed(folder, {"vision/light": "It is darker."}, command="python x")
    text, said = path.read_text(), capsys.readouterr().out
    lines = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    rows = {name: cells for name, *cells in lines}
    low, high = (100 * limit for limit in wilson_interval(6, 10)[1:])
    assert rows["vision/light"][0] == f"60.0 [{low:.1f}, {high:.1f}]" and rows["vision/light"][2].startswith("-20.0 [")
    assert rows["none"][2:] == ["–", "–", "10"]
    assert rows["vision, mean of 2"][0].startswith("50.0 [") and rows["vision, mean of 2"][2].startswith("-30.0 [")
    assert rows["execution, mean of 1"][2].startswith("+20.0 [")
    assert "- **vision/light**: It is darker." in text and "    python x" in text and "vision, mean of 2" in said
    with (folder / "rates.csv").open() as file:
        numbers = list(csv.DictReader(file))
    assert (
        len(numbers) == 40 and sum(int(n["success_once"]) for n in numbers if n["perturbation"] == "vision/table") == 4
    )
    order = ["none", "vision/light", "vision/table", "vision, mean of 2", "execution/object_moved"]
    assert [name for name, *_ in lines[2:7]] == order
    with Image.open(folder / "seen.png") as sheet:  # sorted: none, light, table; the third is a map
        pixels = np.asarray(sheet)
    third = pixels.shape[1] // 3
    middle = pixels[pixels.shape[0] // 2]
    assert tuple(middle[100]) == (255, 0, 0) and tuple(middle[third + 100]) == (0, 255, 0)
    assert len(np.unique(pixels[:, 2 * third :].reshape(-1, 3), axis=0)) > 3


def test_evaluations_of_other_weights_or_seeds_are_outdated(folder):
    assert outdated(folder) == []
    save(folder, evaluation([1] * 10, "vision/light", checkpoint="ppo/2/ef"))
    save(folder, evaluation([1] * 9, "vision/table"))
    assert outdated(folder) == ["vision/light", "vision/table"]
    header, rows = perturbed_table({"": load_evaluation(folder / "eval/none.json")})
    assert len(rows) == 1 and len(header) == len(rows[0])


def test_table_of_a_study(tmp_path, capsys):
    for method, seed, number in (("sft", 0, 2), ("sft", 1, 4), ("ppo", 0, 8)):
        run = tmp_path / f"study/A-v0/{method}/seed_{seed}"
        write_config(run, {"phases": [method], "seed": seed, "env": {"env_id": "A-v0"}})
        for name, lost in {"": 0, "vision/light": 1, "execution/robot_pose": 2}.items():
            save(run / "ood" / method, evaluation(np.arange(10) < number - lost, name))
    run = tmp_path / "study/A-v0/tpo/seed_0"
    write_config(run, {"phases": ["tpo"], "seed": 0, "env": {"env_id": "A-v0"}})
    path = write_perturbed_study(find_runs(tmp_path / "study", ["sft", "ppo"]), tmp_path / "out")
    text = path.read_text()
    # 20 and 40 % of two seeds: 30; in the light 10 and 30: 20; the robot elsewhere 0 and 20: 10.
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| sft")]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["30.0", "20.0", "–", "10.0"] and "(2)" in rows[0][1]
    lights = [row for row in text.splitlines() if row.startswith("| vision/light")]
    assert "-10.0" in lights[0] and "published, another task: RL4VLA" in text
    assert "tpo" not in text and "vision/light" in capsys.readouterr().out
    with (path.parent / "ood.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 9 and {row["success_once_difference"] for row in found} == {"", "-0.1", "-0.2"}
    assert write_perturbed_study(find_runs(tmp_path / "study")[-1:], tmp_path / "none") is None
