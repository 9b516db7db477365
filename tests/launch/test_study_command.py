"""The command that runs a study: real processes that are killed and gone on with; what it prints; mistakes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study as command
import toy_study

from stare_jax.logging import last_lines, read_metrics
from stare_jax.runs.directory import read_record

ROOT = Path(__file__).resolve().parents[2]
FRANKA = ROOT / "configs" / "studies" / "franka_state.py"
RUNS = ["demos", *(f"{method}/seed_{seed}" for seed in (0, 1) for method in ("sft", "ppo", "sta_ppo"))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "toys.py").write_text(toy_study.STUDY)
    return tmp_path / "study"


def start(folder, *arguments):
    """Starts the study of the toy, whose output goes to a file."""
    command = [sys.executable, toy_study.__file__, "study", f"--study={folder.parent / 'toys.py'}"]
    command += [f"--workdir={folder}", *arguments]
    with (folder.parent / "output").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def records(folder):
    found = {}
    for name in RUNS:
        with contextlib.suppress(OSError, ValueError):
            found[name] = json.loads((folder / "PushCube-v1" / f"{name}.json").read_text())
    return found


def iterations(folder, name):
    return [line["step"] for line in last_lines(read_metrics(folder / "PushCube-v1" / name), "ppo")]


@pytest.mark.slow
def test_a_study_that_loses_its_power_goes_on_and_does_nothing_twice(folder):
    """Two methods, two seeds: demonstrations once, imitation once a seed, every run to its end."""
    process, deadline = start(folder), time.monotonic() + 600
    try:
        while not len(iterations(folder, "ppo/seed_0")) >= 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    finally:
        process.kill()
        running = {name: record["pid"] for name, record in records(folder).items() if record["exit_code"] is None}
        for pid in filter(None, running.values()):  # they are not the study's any more, and would go on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert "ppo/seed_0" in running
    before = {name: record for name, record in records(folder).items() if record["exit_code"] == 0}
    assert {"demos", "sft/seed_0"} <= set(before)
    done = iterations(folder, "ppo/seed_0")[-1]

    process = start(folder)
    status, output = process.wait(timeout=600), (folder.parent / "output").read_text()
    assert status == 0, output
    assert "7 of 7 runs finished" in output
    after = records(folder)
    assert set(after) == set(RUNS) and all(record["exit_code"] == 0 for record in after.values())
    assert {name: after[name] for name in before} == before
    assert 0 < after["ppo/seed_0"]["done_before"] <= done / toy_study.NUM_ITERATIONS
    for name in RUNS[1:]:
        run = folder / "PushCube-v1" / name
        assert (run / "report.html").exists() and not (run / "data").exists()  # the demonstrations are elsewhere
        if not name.startswith("sft"):
            assert iterations(folder, name) == list(range(1, toy_study.NUM_ITERATIONS + 1))
    starts = {name: read_record(folder / "PushCube-v1" / name / "ppo").start for name in RUNS[2:] if "ppo" in name}
    assert starts["ppo/seed_0"] == starts["sta_ppo/seed_0"] != starts["ppo/seed_1"] == starts["sta_ppo/seed_1"]


def test_commands_are_printed_in_order_and_nothing_runs(tmp_path, capsys):
    only = "StackCube-v1/ipi/seed_1"
    arguments = [f"--study={FRANKA}", f"--workdir={tmp_path / 'study'}", "--print", f"--only={only}"]
    assert command.main([*arguments, "--config.ppo.gamma=0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cd {ROOT}"
    named = [line for line in lines if line.startswith("#")]
    assert [line.split(",")[0] for line in named] == [
        "# StackCube-v1/demos",
        "# StackCube-v1/sft/seed_1",
        "# StackCube-v1/sta_tpo/seed_1",
        "# StackCube-v1/ipi/seed_1",
    ]
    assert named[-1].endswith(", after StackCube-v1/sta_tpo/seed_1")
    commands = [line for line in lines if line.startswith("python launch/train.py ")]
    assert len(commands) == 4 and all("--config.ppo.gamma=0.9" in line for line in commands)
    assert not (tmp_path / "study").exists()


def test_the_state_of_every_run_is_printed(tmp_path, capsys):
    arguments = [f"--study={FRANKA}", f"--workdir={tmp_path / 'study'}", "--status", "--only=PushCube-v1/*ppo/seed_2"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "franka_state: 0 of 4 runs finished" in printed
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("PushCube")] == [
        ["PushCube-v1/demos", "waiting"],
        ["PushCube-v1/sft/seed_2", "waiting"],
        ["PushCube-v1/ppo/seed_2", "waiting"],
        ["PushCube-v1/sta_ppo/seed_2", "waiting"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study=nowhere.py"], "expected a Python file that defines get_study(); there is none"),
        ([f"--study={ROOT / 'configs' / 'methods.py'}"], "got NoneType, expected get_study() that returns a Study"),
        (
            [f"--study={FRANKA}", "--config.ppo.gama=0.9"],
            "StackCube-v1/demos: --config.ppo.gama: there is no field 'gama' in config.ppo",
        ),
        ([f"--study={FRANKA}", "--config.ppo.gamma=2.0"], "StackCube-v1/demos: config.ppo.gamma: got 2.0"),
        ([f"--study={FRANKA}", "--only=Lift*/grpo/*"], "only: got Lift*/grpo/*, expected some of StackCube-v1/demos"),
        ([f"--study={FRANKA}", "--jobs=9999"], "jobs: got 9999 of 1 cores, expected 1 to"),
    ],
)
def test_mistakes_are_one_line_and_nothing_runs(tmp_path, capsys, arguments, message):
    assert command.main([*arguments, f"--workdir={tmp_path / 'study'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert message in error
    assert not (tmp_path / "study").exists()


def test_an_option_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main([f"--study={FRANKA}", "--job=2"])
    assert "unrecognized arguments: --job=2" in capsys.readouterr().err
