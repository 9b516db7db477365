"""The benchmark of OpenVLA: both implementations choose and learn alike, and each is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openvla_torch
import pytest

BENCHMARK = Path(openvla_torch.__file__).with_name("openvla.py")
SMALL = ["--size=reduced", "--batch=1", "--update-batch=2", "--microbatch=1", "--repeats=1", "--passes=1"]

try:
    openvla_torch.import_peers()
except openvla_torch.MissingPackage as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.slow
def test_both_implementations_are_timed_and_agree(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARK), *SMALL, "--no-compile", f"--out={out}"]
    # Both on the CPU, wherever the tests run: other devices round otherwise.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {(row["case"], row["implementation"]): row for row in result["rows"]}
    cases = ("act", "generate", "update")
    assert set(rows) == {(case, name) for case in cases for name in ("stare_jax", "PyTorch")}
    for case in cases:
        ours, theirs = rows[case, "stare_jax"], rows[case, "PyTorch"]
        assert ours["ratio"] == theirs["median_s"] / ours["median_s"] and ours["flops"] == theirs["flops"] > 0
    generate, update = sorted(result["agreement"], key=lambda line: line["case"])
    assert generate["equal_tokens"] == 1 and max(generate["logp_difference"], update["logp_difference"]) < 1e-4
    assert "PyTorch" in done.stdout and "ratio" in done.stdout
