"""The main job on the real simulator, small: all phases, evaluated, filmed, reported; stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from stare_jax.envs.maniskill.vulkan import has_gpu_driver, software_driver

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--config.env.envs_per_worker=2",
    # Compiling takes most of the time here: a network of few layers, and loops that are not unrolled, compile faster.
    "--config.model.dino.depth=2",
    "--config.model.siglip.depth=2",
    "--config.model.llm.depth=1",
    "--config.model.execution.unroll=1",
    "--config.model.decode_unroll=1",
    "--config.demos.num_demos=12",
    "--config.sft.num_steps=60",
    "--config.sft.batch_size=16",
    "--config.sft.log_every=10",
    "--config.pairs.num_pairs=3",
    "--config.pairs.max_rollouts=16",
    "--config.pairs.temperature=2.0",
    "--config.tpo.num_epochs=2",
    "--config.ppo.num_iterations=2",
    "--config.ppo.num_episodes=4",
    "--config.ppo.minibatch_size=32",
    "--config.evaluation.num_episodes=4",
    "--config.evaluation.num_videos=1",
)


def start(run_directory: Path, *, log) -> subprocess.Popen:
    command = [
        sys.executable,
        "launch/train.py",
        "--config=configs/quickstart.py",
        f"--workdir={run_directory}",
        *SMALL,
    ]
    # A session of its own, whose processes all get the signal, as from Ctrl-C in a terminal.
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def read_metrics(run_directory: Path) -> dict[str, list[dict]]:
    lines = defaultdict(list)
    file = run_directory / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        lines[json.loads(line)["phase"]].append(json.loads(line))
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts, and waits for the end."""
    if not (has_gpu_driver() or software_driver()):
        pytest.skip("rendering needs a Vulkan driver, and there is none on this machine (python launch/doctor.py)")
    directory = tmp_path_factory.mktemp("end_to_end") / "run"
    log_file = directory.parent / "log.txt"
    with log_file.open("w") as log:
        code = start(directory, log=log).wait(timeout=900)
    assert code == 0, log_file.read_text()[-5000:]
    return {"directory": directory, "log": log_file.read_text()}


@pytest.mark.slow  # tests/runs kills and interrupts runs of a toy
def test_an_interrupted_run_says_how_to_go_on_and_does(run, tmp_path):
    directory, log_file = tmp_path / "run", tmp_path / "log.txt"
    with log_file.open("w") as log:
        first = start(directory, log=log)
        deadline = time.monotonic() + 600
        while first.poll() is None and not read_metrics(directory)["sft"] and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(timeout=120) == 130
        before = [line["step"] for line in read_metrics(directory)["sft"]]
        assert start(directory, log=log).wait(timeout=900) == 0
    text = log_file.read_text()
    assert "go on with: " in text and f"--workdir={directory}" in text and "Traceback" not in text
    steps = [line["step"] for line in read_metrics(directory)["sft"]]
    assert steps == sorted(set(steps)), "a step was done twice"
    assert steps[-1] == 60 and 0 < before[-1] < 60


def test_every_phase_ran_stayed_finite_and_compiled_once(run):
    metrics = read_metrics(run["directory"])
    for phase in ("sft", "tpo", "ppo"):
        losses = [line[f"{phase}/loss"] for line in metrics[phase]]
        assert losses and None not in losses
        assert all(line["perf/compilations"] == 0 for line in metrics[phase][1:]), phase
    assert len(metrics["ppo"]) == 2
    assert {"time/env_s", "time/policy_s", "time/update_s", "time/other_s"} <= metrics["ppo"][-1].keys()


def test_evaluations_are_on_the_same_seeds(run):
    files = {phase: run["directory"] / "eval" / f"{phase}.json" for phase in ("sft", "tpo", "ppo")}
    seeds = [json.loads(file.read_text())["episodes"]["seed"] for file in files.values()]
    assert seeds[0] == seeds[1] == seeds[2] == [0, 1, 2, 3]


def test_the_report_links_only_to_what_is_there(run):
    html = (run["directory"] / "report.html").read_text()
    for kind, pattern in (("videos", "*.mp4"), ("figures", "timeline_*.png")):
        files = list((run["directory"] / kind).glob(pattern))
        assert files and any(f"{kind}/{file.name}" in html for file in files)


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(run):
    log = run["directory"].parent / "again.txt"
    with log.open("w") as file:
        assert start(run["directory"], log=file).wait(timeout=300) == 0
    text = log.read_text()
    assert "success at any step" in text and "simulator" not in text
