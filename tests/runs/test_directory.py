"""What a run directory refuses, what it lets change, and that it takes one process at a time."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stare_jax.config import ConfigError
from stare_jax.runs.directory import begin_phase, differences, finish_phase, is_finished, locked, open_directory

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "env": {"env_id": "PushCube-v1", "num_workers": 2, "max_restarts": 100},
    "model": {"image_size": 64},
    "stages": {"tau": 0.1},
    "demos": {"noise_scales": ((0.0, 1.0),)},
    "sft": {"num_steps": 30},
    "seed": 0,
    "init_from": "",
    "demos_from": "",
}
SECTION = {"num_steps": 30, "optimizer": {"learning_rate": 1e-3, "freeze": ("^value",)}}


def changed(config, path, value):
    """A copy of nested dicts with the field at `a.b` replaced."""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[name] = value
    return config


@pytest.fixture
def begun(tmp_path):
    """A run directory in which a phase has begun."""
    open_directory(tmp_path, CONFIG, resume=False)
    begin_phase(tmp_path / "sft", SECTION, None)
    return tmp_path


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_is_gone_on_with_only_where_that_is_asked_for(begun):
    with pytest.raises(ConfigError, match="holds a run already; --resume goes on"):
        open_directory(begun, CONFIG, resume=False)
    open_directory(begun, CONFIG, resume=True)


def test_a_directory_in_which_nothing_has_begun_takes_any_configuration(tmp_path):
    open_directory(tmp_path, CONFIG, resume=False)
    other = changed(CONFIG, "env.env_id", "PullCube-v1")
    open_directory(tmp_path, other, resume=False)
    assert json.loads((tmp_path / "config.json").read_text())["env"]["env_id"] == "PullCube-v1"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("env.env_id", "PullCube-v1"),
        ("model.image_size", 32),
        ("stages.tau", 0.2),
        ("demos.noise_scales", ((0.1, 1.0),)),
        ("seed", 1),
        ("init_from", "runs/x/sft"),
        ("demos_from", "data/x"),
    ],
)
def test_what_all_phases_depend_on_stays(begun, path, value):
    with pytest.raises(ConfigError, match=rf"another configuration: config\.{path} was .*, is .*; --workdir"):
        open_directory(begun, changed(CONFIG, path, value), resume=True)
    assert json.loads((begun / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_what_changes_only_the_speed_may_change_and_nothing_is_said(begun, capsys):
    faster = changed(changed(CONFIG, "env.num_workers", 8), "env.max_restarts", 3)
    open_directory(begun, faster, resume=True)
    assert capsys.readouterr().out == ""
    assert json.loads((begun / "config.json").read_text())["env"]["num_workers"] == 8


def test_what_is_a_phases_own_may_change_as_far_as_the_run_goes_and_is_said(begun, capsys):
    open_directory(begun, changed(CONFIG, "sft.num_steps", 60), resume=True)
    assert capsys.readouterr().out == "changed since the run began: config.sft.num_steps was 30, is 60\n"


def test_differences_name_fields_that_come_and_go():
    old, new = {"a": {"b": 1, "c": [2]}, "gone": "x"}, {"a": {"b": 1, "c": [3]}, "come": None, "there": 4}
    assert differences(old, new, "config") == [
        "config.a.c was [2], is [3]",
        "config.gone was 'x', is None",
        "config.there was None, is 4",
    ]


# ----------------------------------------------------------------------------------------------------------- phases


def test_a_phase_is_done_once_it_is_finished_with_the_same_configuration(tmp_path):
    assert not begin_phase(tmp_path, SECTION, None)
    assert not begin_phase(tmp_path, SECTION, None)  # begun is not finished
    finish_phase(tmp_path)
    assert begin_phase(tmp_path, SECTION, None) and is_finished(tmp_path)


@pytest.mark.parametrize(("phase", "name"), [("sft", "num_steps"), ("ppo", "num_iterations")])
def test_a_phase_may_be_made_longer_and_is_then_not_finished(tmp_path, phase, name):
    section, directory = {name: 30}, tmp_path / phase
    begin_phase(directory, section, None)
    finish_phase(directory)
    assert not begin_phase(directory, {name: 60}, None) and not is_finished(directory)
    with pytest.raises(ConfigError, match=f"config.{name} was 60, is 30"):
        begin_phase(directory, section, None)


@pytest.mark.parametrize("before", [None, 500])
def test_a_batch_of_steps_is_no_length_of_ppo(tmp_path, before):
    begin_phase(tmp_path / "ppo", {"num_steps": before}, None)
    with pytest.raises(ConfigError, match=f"config.num_steps was {before}, is 1500"):
        begin_phase(tmp_path / "ppo", {"num_steps": 1500}, None)


def test_nothing_else_of_a_phase_may_change(tmp_path):
    sft = tmp_path / "sft"
    begin_phase(sft, SECTION, None)
    finish_phase(sft)
    other = changed(changed(SECTION, "optimizer.learning_rate", 1e-4), "num_steps", 60)
    with pytest.raises(
        ConfigError, match=r"configuration: config.optimizer.learning_rate was 0.001, is 0.0001; delete"
    ):
        begin_phase(sft, other, None)
    assert begin_phase(sft, SECTION, None)  # what was refused has changed nothing


def test_a_phase_remembers_all_phases_before_it(tmp_path):
    sft, tpo, ppo = (tmp_path / name for name in ("sft", "tpo", "ppo"))
    begin_phase(sft, SECTION, None)
    begin_phase(tpo, {"beta": 0.1}, sft)
    begin_phase(ppo, {"gamma": 0.99}, tpo)
    finish_phase(ppo)
    assert begin_phase(ppo, {"gamma": 0.99}, tpo)
    with pytest.raises(ConfigError, match="ppo: was begun with another configuration: after.after was .*, is None"):
        begin_phase(ppo, {"gamma": 0.99}, sft)
    # A longer imitation is another start for what comes after.
    begin_phase(sft, changed(SECTION, "num_steps", 60), None)
    with pytest.raises(
        ConfigError, match=r"tpo: .*after.config.num_steps was 30, is 60; delete it, and what came after"
    ):
        begin_phase(tpo, {"beta": 0.1}, sft)


# ------------------------------------------------------------------------------------------------------------- lock

_HOLD = """
import sys, time
from pathlib import Path
from stare_jax.runs.directory import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(ConfigError, match=f"{tmp_path}: another process is at work"), locked(tmp_path):
                pass
        finally:
            holder.kill()
    for _ in range(2):  # by itself, too, a lock is let go of
        with locked(tmp_path):
            pass


def test_a_second_training_is_told_in_one_line(tmp_path):
    command = [sys.executable, "launch/train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}", "--resume"]
    with locked(tmp_path):
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: {tmp_path}: another process is at work") and second.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
