"""Tables and curves of a study's folder, on runs with metrics and evaluations made by hand."""

import csv
import re

import compare as command
import pytest
from made_runs import make_run, save_rate

from stare_jax.evaluate.intervals import mean_interval, mean_of_rates, ratio_of_means, wilson_interval
from stare_jax.logging import write_config
from stare_jax.report.curves import read_run
from stare_jax.report.published import PUBLISHED, PUBLISHED_HOLDING

RATES = {"ppo": (5, 6, 7), "sta_ppo": (8, 9, 10)}
RISES = {"ppo": (5, 6, 7), "sta_ppo": (2, 3, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three seeds of PPO and STA-PPO on PushCube and their imitations; STA-PPO on PullCube; a run without results."""
    folder = tmp_path_factory.mktemp("clone") / "runs" / "x"
    for seed in range(3):
        sft = folder / "PushCube-v1" / "sft" / f"seed_{seed}"
        write_config(sft, {"seed": seed, "phases": ["sft"], "env": {"env_id": "PushCube-v1"}})
        (sft / "sft").mkdir()
        save_rate(sft, "sft", 1 + seed)
        for method, rates in RATES.items():
            run = folder / "PushCube-v1" / method / f"seed_{seed}"
            source = f"runs/x/PushCube-v1/sft/seed_{seed}/sft"
            make_run(run, RISES[method][seed], seed, phases=["ppo"], init_from=source)
            save_rate(run, "ppo", rates[seed])
    make_run(folder / "PullCube-v1" / "sta_ppo" / "seed_0", 99, 0, "PullCube-v1", phases=["ppo"])
    save_rate(folder / "PullCube-v1" / "sta_ppo" / "seed_0", "ppo", 7)
    write_config(folder / "PullCube-v1" / "ipi" / "seed_0", {"phases": ["ppo"], "env": {"env_id": "PullCube-v1"}})
    return folder


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert command.main([f"--study={folder}", f"--out={out}", "--smooth=1", "--target=0.8"]) == 0
    return out


def rows_of(text):
    return [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if row.startswith("| ")]


def percent(estimate, number):
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f} [{max(low, 0):.1f}, {min(high, 100):.1f}] ({number})"


def test_success_by_method_and_task(out):
    once, end = tables(out)
    assert once[0] == ["success at any step, %", "PullCube-v1", "PushCube-v1", "average"]
    by_method = {row[0]: row[1:] for row in once[1:]}
    assert list(by_method) == [
        "sft",
        "published: sft, OpenVLA-7B",
        "ppo",
        "sta_ppo",
        "published: sta_ppo_paper, OpenVLA-7B",  # beside ours, as no run has the paper's potentials
        "ipi",
        "published: ipi, OpenVLA-7B",
    ]
    assert by_method["sft"][1] == percent(mean_interval([0.1, 0.2, 0.3]), 3)
    assert by_method["ppo"][:2] == ["–", percent(mean_interval([0.5, 0.6, 0.7]), 3)]
    assert by_method["sta_ppo"][:2] == [percent(wilson_interval(7, 10), 1), percent(mean_interval([0.8, 0.9, 1.0]), 3)]
    # Of seed 0, which both tasks have: 80 and 70 %.
    assert by_method["sta_ppo"][2] == percent(mean_of_rates([wilson_interval(8, 10), wilson_interval(7, 10)]), 1)
    assert by_method["ipi"] == ["–", "–", "–"]
    assert by_method["published: sft, OpenVLA-7B"] == ["31.0", "11.7", "21.4"]
    assert [row[0] for row in end[1:]] == ["sft", "ppo", "sta_ppo", "ipi"]  # the paper has no such numbers


def tables(out):
    """The two tables of success."""
    found, rows = [], rows_of((out / "README.md").read_text().split("\n## ")[0])
    for row in rows:
        if row[0].startswith("success at"):
            found.append([])
        if row[0] != "---":
            found[-1].append(row)
    return found


def test_steps_to_the_target_against_the_baseline(out):
    text = (out / "README.md").read_text()
    assert "### Environment steps to 80 % success" in text
    steps = {row[0]: row[1:] for row in rows_of(text.split("## PushCube-v1")[1]) if len(row) == 5}
    assert steps["ppo"] == ["3 of 3", "600", "–", "–"]
    value, low, high = ratio_of_means([200, 300, 200], [500, 600, 700])
    assert value == pytest.approx(7 / 18)
    assert steps["sta_ppo"] == ["3 of 3", "200", f"{value:.2f} [{low:.2f}, {high:.2f}]", "3"]
    pull = {row[0]: row[1:] for row in rows_of(text.split("## PullCube-v1")[1].split("\n## ")[0]) if len(row) == 5}
    assert pull["sta_ppo"] == ["0 of 1", "not reached", "–", "–"]


def test_numbers_and_curves_are_beside_the_tables(out):
    with (out / "success.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 6 + 2
    (row,) = [row for row in rows if (row["method"], row["seed"]) == ("sta_ppo", "1")]
    assert (row["phase"], row["episodes"], row["success_once"], row["stages"]) == ("ppo", "10", "0.9", "goal=9/10")
    assert {row["success_once"] for row in rows if row["method"] == "ipi"} == {""}
    for name in ("curves.png", "curves.csv", "README.md"):
        assert (out / "PushCube-v1" / name).exists() and (out / "PullCube-v1" / name).exists()


def test_a_run_of_several_tasks_is_a_row_beside_those_of_one(tmp_path):
    """Of 5 successes in 10 episodes in turns 3 are of the first task's 5, 2 of the second's; another run is at work."""
    folder, tasks = tmp_path / "x", ("PullCube-v1", "PushCube-v1")
    env = {"env_id": "+".join(tasks), "tasks": tasks}
    for task in tasks:
        make_run(folder / task / "ipi" / "seed_0", 2, 0, task, phases=["ppo"])
        save_rate(folder / task / "ipi" / "seed_0", "ppo", 8)
    for seed in (0, 1):
        make_run(folder / "all" / "ipi" / f"seed_{seed}", 2, seed, phases=["ppo"])
        write_config(folder / "all" / "ipi" / f"seed_{seed}", {"seed": seed, "phases": ["ppo"], "env": env})
    save_rate(folder / "all" / "ipi" / "seed_0", "ppo", 5, tasks=tasks)
    assert command.main([f"--study={folder}", f"--out={tmp_path / 'out'}", "--smooth=1"]) == 0
    once, _ = tables(tmp_path / "out")
    assert once[0] == ["success at any step, %", *tasks, "average"]
    (row,) = [row for row in once if row[0] == "ipi, all"]
    both = mean_of_rates([wilson_interval(3, 5), wilson_interval(2, 5)])
    assert row[1:] == [percent(wilson_interval(3, 5), 1), percent(wilson_interval(2, 5), 1), percent(both, 1)]
    with (tmp_path / "out" / "success.csv").open() as file:
        rows = [
            (row["task"], row["seed"], row["success_once"]) for row in csv.DictReader(file) if "all" in row["method"]
        ]
    assert rows == [(tasks[0], "0", "0.6"), (tasks[0], "1", ""), (tasks[1], "0", "0.4"), (tasks[1], "1", "")]
    # Its learning curve is that of all tasks together, and stands beside none of one.
    assert "ipi, all" not in (tmp_path / "out" / tasks[0] / "README.md").read_text()


def test_a_run_was_before_what_it_began_from(folder):
    """Its imitation is another run, named relative to the clone that holds both."""
    run = read_run("x", folder / "PushCube-v1" / "ppo" / "seed_2", "ppo")
    assert run.before.summary.success_once.value == pytest.approx(0.3)
    assert run.after.summary.success_once.value == pytest.approx(0.7)
    assert read_run("x", folder / "PullCube-v1" / "sta_ppo" / "seed_0", "ppo").before is None


def test_ratios_that_are_bounds_are_marked(tmp_path):
    for method, rises in {"ppo": (5, 99), "sta_ppo": (2, 2), "dense": (99, 2)}.items():
        for seed, rise in enumerate(rises):
            make_run(tmp_path / "x" / "PushCube-v1" / method / f"seed_{seed}", rise, seed, phases=["ppo"])
    assert command.main([f"--study={tmp_path / 'x'}", f"--out={tmp_path / 'out'}", "--smooth=1"]) == 0
    steps = {row[0]: row[3] for row in rows_of((tmp_path / "out" / "README.md").read_text()) if len(row) == 5}
    # PPO takes 500 steps and all of 800, STA-PPO 200 and 200, "dense" all of 800 and 200.
    assert steps["sta_ppo"].startswith("≤ 0.31 [") and steps["dense"].startswith("? 0.77 [")


def test_published_numbers_are_those_of_the_tables():
    """Averages are the paper's last columns, which it has rounded up and down."""
    for backbone, method, tasks, average in (
        ("OpenVLA-7B", "rl4vla", slice(0, 4), 92.5),
        ("OpenVLA-7B", "rl4vla", slice(4, 8), 70.5),
        ("OpenVLA-7B", "ipi", slice(4, 8), 96.4),
        ("OpenVLA-7B", "sta_ppo_paper", slice(0, 4), 94.6),
        ("pi0.5", "pi_rl", slice(0, 4), 79.6),
        ("pi0.5", "pi_rl", slice(4, 8), 80.1),
        ("pi0.5", "ipi", slice(4, 8), 89.9),
    ):
        values = list(PUBLISHED[backbone][method].values())[tasks]
        assert set(PUBLISHED_HOLDING[backbone]) == set(PUBLISHED[backbone])
        assert sum(values) / 4 == pytest.approx(average, abs=0.08), (backbone, method)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study={}/nowhere"], "expected a folder with runs in <task>/<method>/seed_<n>; there are none"),
        (["--study={}", "--target=2"], "target: got 2, expected in (0, 1]"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, arguments, message):
    assert command.main([f"--out={tmp_path / 'out'}", *(argument.format(folder) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--study=x", "A=b"], ["--study=x", "--phase=sft"]])
def test_settings_or_a_study(arguments):
    with pytest.raises(SystemExit):
        command.main(["--out=x", *arguments])
