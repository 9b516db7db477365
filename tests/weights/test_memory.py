"""How much memory conversion takes, measured in a process of its own, over four devices."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import openvla_files
import pytest
from openvla_files import SMALL, Sizes, Tower, read_folder

LARGE = Sizes(Tower(8, 3, 32), Tower(12, 3, 44), width=1024, depth=16, mlp=1024, key_width=1024, vocab=16384, image=28)
SLACK = 190 * 2**20
"""Orbax's cache of 100 MB, and what the allocator does not give back."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory is used")
def test_the_host_never_holds_the_model_twice(tmp_path):
    folders = {"large": LARGE, "small": SMALL._replace(key_width=16)}
    for name, sizes in folders.items():
        # Random bits, which cannot be compressed.
        tensors = openvla_files.random_bits(openvla_files.checkpoint_shapes(sizes), "bfloat16")
        openvla_files.write(tmp_path / name, tensors, openvla_files.config_json(sizes, "bfloat16"))
    model = sum(path.stat().st_size for path in (tmp_path / "large").glob("model-*"))
    assert model > 290e6
    leaf = 16 * 1024 * 1024 * 2  # the sixteen layers of gate_proj, bfloat16
    ours, back = tmp_path / "ours", tmp_path / "back"
    growth = grow(tmp_path, f"--from={tmp_path / 'large'}", f"--to={ours}", "--fsdp=2", "--tensor=2")
    # The model once, and what is being cut or written of one leaf; twice the model would be more.
    assert growth < model + leaf + SLACK < 2 * model
    growth = grow(tmp_path, f"--from={ours}", f"--to={back}")
    # No more than two leaves, one as it is stored and one as it is, whatever the model's size.
    assert growth < 2 * leaf + SLACK < 0.9 * model
    assert read_folder(back) == read_folder(tmp_path / "large")


def grow(folder, *arguments):
    """By how much the memory of a process grew that ran the command on four devices, in bytes."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = Path(__file__).with_name("memory_process.py")
    small, out = folder / "small", tempfile.mkdtemp(dir=folder) + "/small"
    command = [sys.executable, script, small, out, *arguments]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
