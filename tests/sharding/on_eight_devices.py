"""Processes with eight fake devices, and what is expected of what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_on_eight_devices(script, *arguments, timeout):
    """Runs a file of this folder in a process with eight fake devices and returns what it prints last."""
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(tests / "models"), str(tests / "train"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    result = subprocess.run(
        [sys.executable, str(tests / "sharding" / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_models(report):
    assert report["exchanged_by_sampling"] == []
    for found in report["steps"]:
        # Sums over devices are taken in another order.
        assert found["difference"] < 1e-5 < 1e-3 < found["change"], found
        assert found["misplaced"] == [] and found["exchanged"] == [], found
    for found in report["actions"]:
        assert found["tokens_0"] and found["tokens_1"], found
        assert found["difference_0"] < 1e-4 and found["difference_1"] < 1e-4, found


def check_full_size(case, largest):
    tensor = int(case.split()[2])
    found = run_on_eight_devices("compile_full_size.py", *case.split(), timeout=1200)
    assert found["moved_out"] == [] and found["largest"] <= largest // tensor, found["largest_is"]
    if tensor == 1:
        assert found["not_zero3"] == []
    if found["token_numbers"] is not None:
        # 0.3 GB of 16-bit numbers for one decoded token of 64 rows; the weights of all layers would be 13 GB.
        assert 0 < found["token_numbers"] <= 0.15e9
    # What a device holds is its share, up to a few scalars, and what a step changes is changed in place.
    assert abs(found["argument_bytes"] - found["expected_bytes"]) < 2**10
    assert found["reused_bytes"] == found["moving_bytes"]
