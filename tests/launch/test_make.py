"""`make quickstart`: the last line after Ctrl-C is the command's own, a failure is a failure; modules stay compiled."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = """#!/bin/sh
trap 'echo "go on with: $0 $*"; exit {stopped}' INT TERM
echo "$@"
i=0
while [ $i -lt {ticks} ]; do sleep 0.1; i=$((i + 1)); done
exit {status}
"""


def outside_of_make():
    """Returns the environment without what make tells those that it starts: it may have started the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}


def make(tmp_path, *, sends=None, to_make=True, stopped=130, status=0):
    """Runs `make quickstart` with a script for Python, and returns (exit status, lines of its output)."""
    script = tmp_path / "python"
    script.write_text(TRAINING.format(stopped=stopped, status=status, ticks=600 if sends else 1))
    script.chmod(0o755)
    argv = ["make", "-o", "setup-vulkan", "quickstart", f"PYTHON={script}", "ARGS=--config.phases=sft,ppo"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = outside_of_make()
    # A shell cannot trap a signal that was ignored when it was started, as Ctrl-C is in the background of a script.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True, **output) as process:
        signal.signal(signal.SIGINT, previous)
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            if sends:
                time.sleep(0.2)
                pids = subprocess.run(["ps", "-o", "pid=", "-g", str(process.pid)], capture_output=True, text=True)
                assert len(pids.stdout.split()) >= 2
                os.killpg(process.pid, sends)  # as a terminal does
            lines += process.communicate(timeout=60)[0].splitlines(keepends=True)
        finally:
            process.kill()
    return process.returncode, [line.strip() for line in lines]


def test_ctrl_c_ends_with_how_to_go_on(tmp_path):
    status, lines = make(tmp_path, sends=signal.SIGINT)
    arguments = "launch/train.py --config=configs/quickstart.py --config.phases=sft,ppo"
    assert lines[0].endswith(f"python {arguments}") and lines[1] == arguments
    assert status != 0 and lines[2:] == [f"go on with: {tmp_path / 'python'} {arguments}"]


@pytest.mark.parametrize(("sends", "stopped", "status"), [(None, 130, 1), (None, 130, 130), (signal.SIGINT, 1, 0)])
def test_a_failure_keeps_its_status_and_is_said(tmp_path, sends, stopped, status):
    code, lines = make(tmp_path, sends=sends, stopped=stopped, status=status)
    assert (
        code != 0 and lines[-1].startswith("make: *** ") and lines[-1].endswith(f"Error {stopped if sends else status}")
    )


def test_a_run_that_ends_is_a_success(tmp_path):
    assert make(tmp_path)[0] == 0


def test_what_python_compiles_is_kept_where_the_shell_says_otherwise(tmp_path):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "${PYTHONDONTWRITEBYTECODE-kept}"\n')
    script.chmod(0o755)
    argv, env = ["make", "-o", "setup", "test", f"PYTHON={script}"], outside_of_make()
    for value in ({}, {"PYTHONDONTWRITEBYTECODE": "1"}):
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(argv, cwd=ROOT, env=env | value, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "kept", done
