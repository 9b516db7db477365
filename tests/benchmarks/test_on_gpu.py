"""The script for a GPU: parts that fail or last too long leave their reason and what they measured; one table."""

import importlib
import json
import os
import time
from pathlib import Path

import iteration
import on_gpu
import on_gpu_config
import pytest

from stare_jax.config import from_dict
from stare_jax.runs.config import RunConfig
from stare_jax.runs.fit import check_fit

ROW = {"case": "act", "batch": 2, "implementation": "stare_jax", "median_s": 0.5, "decisions_per_s": 4.0, "mfu": 0.125}
SAVE = f"import sys, pathlib; pathlib.Path(sys.argv[1][6:]).write_text('''{json.dumps({'rows': [ROW]})}'''); "


def test_every_part_runs_and_says_why_it_ended(tmp_path, capsys):
    out, start = tmp_path / "new" / "result.json", time.monotonic()
    late = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    parts = [
        on_gpu.Part("slow", 5.0, ["-c", SAVE + late]),
        on_gpu.Part("broken", 60.0, ["-c", "print('one'); raise SystemExit('two')"]),
        on_gpu.Part("good", 60.0, ["-c", SAVE]),
    ]
    document = on_gpu.run_all(parts, dict(os.environ), total=120.0, out=out)
    assert json.loads(out.read_text()) == document and time.monotonic() - start < 60
    slow, broken, good = document["parts"].values()
    assert slow["result"] == good["result"] == {"rows": [ROW]} and broken["result"] is None and "reason" not in good
    assert slow["reason"].startswith("cut off after 5 s") and broken["reason"] == "ended with 1: two"
    # What it had started has ended with it: nobody waits for it, so that it may be left as a name.
    status = Path(f"/proc/{slow['log'][-1]}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    on_gpu.print_all(document)
    said = capsys.readouterr().out
    assert said.count("500") == 2 and "12.5 %" in said and "broken: ended with 1: two" in said


def test_no_part_begins_when_the_time_is_over(tmp_path):
    parts = [on_gpu.Part("late", 60.0, ["-c", "import time; time.sleep(60)"])]
    part = on_gpu.run_all(parts, dict(os.environ), total=0.0, out=tmp_path / "result.json")["parts"]["late"]
    assert part["reason"] == "cut off after 0 s" and part["seconds"] < 5


def test_the_parts_of_a_gpu_fit_into_eight_minutes():
    for is_reduced in (False, True):
        parts = on_gpu.find_parts(peer="my.py:make", is_reduced=is_reduced)
        assert sum(part.limit for part in parts) <= on_gpu.TOTAL < 8 * 60
        assert all((on_gpu.ROOT / part.arguments[0]).is_file() for part in parts)
        assert sum("--peer=my.py:make" in part.arguments for part in parts) == 1


@pytest.mark.parametrize("is_reduced", [False, True])
def test_every_part_takes_its_arguments(is_reduced):
    read = {}
    for part in on_gpu.find_parts(peer="my.py:make", is_reduced=is_reduced):
        script, *arguments = part.arguments
        read[part.name] = importlib.import_module(Path(script).stem).parse([*arguments, "--out=result.json"])
    assert len(read) == 4 and all(args.out == Path("result.json") for args in read.values())
    sizes = read["openvla"].size, read["pi05"].size, read["openvla"].batch, read["pi05"].batch
    assert sizes == (("reduced", "tiny", (1,), (2,)) if is_reduced else ("7b", "full", (1, 32), (1, 32)))


def test_an_iteration_has_a_line_for_each_of_its_parts():
    seconds = dict.fromkeys(on_gpu.ITERATION, 0.25)
    row = seconds | {"mesh": {"data": 1, "fsdp": 8}, "rows": 4, "num_decisions": 8, "decisions_per_s": 32.0}
    row |= {"act": {"median_s": 0.5}, "device": {"median_s": 0.25}, "plan_bytes": {"rollout": 3e9, "update": 4e9}}
    row |= {"peak_bytes": {"start": None, "rollout": 2e9, "update": None}}
    lines = list(on_gpu.table_rows("pi05", {"rows": [row]}))
    parts = [f"- {name}" for name in ("act", "env", "record", "prepare", "update")]
    assert [line[1] for line in lines] == ["act", "device", "iteration", *parts]
    assert lines[0][3:6] == ("fsdp8", "500", "8") and lines[0][-2:] == ("2", "3") and lines[2][-2:] == ("", "4")
    assert set(map(len, lines)) == {len(on_gpu.HEADER)} and on_gpu.ITERATION[1:] == iteration.PARTS


@pytest.mark.parametrize("size", ["", ",reduced"])
@pytest.mark.parametrize("name", on_gpu.MODELS)
def test_the_configurations_are_runs_of_one_device(name, size):
    values = on_gpu_config.get_config(name + size).to_dict()
    config = from_dict(RunConfig, {key: value for key, value in values.items() if key != "name"})
    check_fit(config, is_here=False)
    num_decisions = config.ppo.num_episodes * config.env.horizon // getattr(config.model, "chunk", 1)
    assert num_decisions == config.ppo.minibatch_size == 2 * config.env.num_envs and config.mesh.fsdp == 1
    assert config.model.execution.dtype == "bfloat16" and (name == "pi05") == (config.model.lora is None)
