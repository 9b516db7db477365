"""A signal to a real training process leaves a checkpoint that the next one goes on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import toy_ppo
from toy_task import Writer

from stare_jax.logging import read_metrics
from stare_jax.state import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, toy_ppo.__file__, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == toy_ppo.STOPPED, errors[-3000:]
    assert "ppo: stopped and saved after" in output

    done = read_metrics(tmp_path)[-1]["step"]
    assert done >= 3
    directory = tmp_path / "ppo" / "checkpoints"
    assert checkpoint.complete_steps(directory) == [done]
    writer = Writer()
    toy_ppo.train(tmp_path, done + 1, resume=True, writer=writer)
    assert writer.column("step") == [done + 1]
    assert writer.lines[0]["env/steps"] > checkpoint.load_counters(directory, step=done)["env_steps"]
    assert checkpoint.complete_steps(directory) == [done, done + 1]
