"""What the files of launch/pod start, as a dry run says it."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

POD = Path(__file__).resolve().parents[2] / "launch" / "pod"
FLAGS = ["--config=configs/pod_smoke.py:state", "--config.phases=sft,ppo", "--workdir=/mnt/my runs"]


def dry_run(*command, **variables):
    environment = os.environ | {"DRY_RUN": "1"} | variables
    return subprocess.run(["bash", *map(str, command)], env=environment, capture_output=True, text=True)


def test_every_host_of_a_slice_gets_the_command():
    words = shlex.split(dry_run(POD / "tpu.sh", "my-slice", "us-west4-a", *FLAGS).stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-slice"]
    assert words[6:8] == ["--zone=us-west4-a", "--worker=all"]
    place, _, command = words[8].removeprefix("--command=").partition(" && exec ")
    assert place == "cd stare_jax"
    assert shlex.split(command) == [".venv/bin/python", "launch/train.py", "--coordinator=auto", *FLAGS]


def test_one_host_is_told_to_stop():
    words = shlex.split(dry_run(POD / "tpu.sh", "my-slice", "us-west4-a", STOP="1").stdout)
    assert words[7] == "--worker=0" and shlex.split(words[8])[:3] == ["--command=pkill", "-TERM", "-f"]


def test_slurm_starts_the_command_in_a_step():
    words = shlex.split(dry_run(POD / "slurm.sbatch", *FLAGS).stdout)
    assert words == ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "launch/train.py", *FLAGS]


@pytest.mark.parametrize("command", [("tpu.sh",), ("tpu.sh", "my-slice", "us-west4-a"), ("slurm.sbatch",)])
def test_nothing_to_start_is_refused(command):
    result = dry_run(POD / command[0], *command[1:])
    assert result.returncode == 2 and "--config" in result.stderr and not result.stdout
