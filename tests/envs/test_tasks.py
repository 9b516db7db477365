"""Tasks of one's own: found by file and by module, refused in seconds, trained on in every phase."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stare_jax.config import ConfigError, UserError
from stare_jax.envs import EnvConfig, load_task, make_expert, make_vec_env
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.stages import TASKS, get_task, separate

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "place_sphere.py"
OWN_STAGES = EXAMPLE.with_name("hold_cube.py")


@pytest.fixture
def write(tmp_path):
    """Returns write(source) -> the path of a file with this source."""

    def write(source, name="my_task.py"):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("env_id", TASKS)
def test_the_eight_are_found_by_the_same_function(env_id):
    task = load_task(env_id)
    assert task.spec is get_task(env_id) and task.expert is not None
    by_name = EnvConfig(task=env_id)
    assert by_name == EnvConfig(env_id) and by_name.task_name == env_id and by_name.spec is task.spec
    assert make_expert(env_id).init() == task.expert_init()


def test_a_file_is_a_task():
    config = EnvConfig(task=str(EXAMPLE))
    assert (config.env_id, config.horizon, config.action_dim) == ("PlaceSphere-v1", 30, 7)
    assert config.spec.family == "pick-place" and config.spec.instruction == "put the ball into the bin"
    # The file says which simulator it is, whatever else is given.
    assert EnvConfig("PullCube-v1", task=str(EXAMPLE)).env_id == "PlaceSphere-v1"
    assert make_expert(config.task_name).action_scale == (1.0,) * 7


def test_a_file_is_imported_once_by_whatever_path(monkeypatch):
    """Its environment would be registered twice, which the simulator refuses in a warning."""
    monkeypatch.chdir(ROOT)
    assert load_task(str(OWN_STAGES.relative_to(ROOT))) is load_task(str(OWN_STAGES))


def test_a_file_that_was_put_right_is_read_anew(tmp_path):
    file = tmp_path / "task.py"
    file.write_text("SPEC = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="TASK: got nothing"):
        load_task(str(file))
    file.write_text("from stare_jax.envs import load_task\nTASK = load_task('PushCube-v1')  # longer\n", "utf-8")
    assert load_task(str(file)) is load_task("PushCube-v1")


def test_a_module_in_the_working_directory_is_a_task(tmp_path, monkeypatch):
    package = tmp_path / "sphere_tasks"
    package.mkdir()
    shutil.copy(EXAMPLE, package / "place.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert EnvConfig(task="sphere_tasks.place").env_id == "PlaceSphere-v1"


SPEC = "from stare_jax.envs import Task, load_task\nPUSH = load_task('PushCube-v1')\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("SPEC = 1\n", "TASK: got nothing, expected TASK = Task"),
        ("TASK = 1\n", "TASK: got a int, expected TASK = Task"),
        (f"{SPEC}TASK = Task('push', PUSH.scene)\n", "TASK.spec: got a str, expected a TaskSpec"),
        (f"{SPEC}TASK = Task(PUSH.spec, PUSH.spec)\n", "TASK.scene: got a TaskSpec, expected a Scene"),
        (f"{SPEC}TASK = Task(PUSH.spec, PUSH.scene, 'expert')\n", "TASK.expert: got a str, expected a function"),
        (
            f"{SPEC}TASK = Task(PUSH.spec, PUSH.scene._replace(action_scale=(1.0,) * 4))\n",
            "TASK.scene.action_scale: got 4 numbers, expected 7, as many as pd_ee_delta_pose has",
        ),
        (
            f"import dataclasses\n{SPEC}TASK = Task(dataclasses.replace(PUSH.spec, env_id='a/../b'), PUSH.scene)\n",
            "TASK.spec.env_id: got 'a/../b', expected letters, digits",
        ),
        ("import a_module_of_nobody\n", "cannot be imported: ModuleNotFoundError: .*a_module_of_nobody.*my_task.py:1"),
        ("x = 1\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero .*my_task.py:2"),
        # Stages whose parts do not fit the family that they are taken from are refused by TaskSpec itself.
        (
            "import dataclasses\nfrom stare_jax.stages import get_task\n"
            "dataclasses.replace(get_task('PushCube-v1'), stage_names=('reach', 'poke'))\n",
            "cannot be imported: ValueError: .*event_fns has length 4, expected 2, one for each of reach, poke",
        ),
    ],
)
def test_files_that_are_no_task_are_refused(write, source, message):
    path = write(source)
    with pytest.raises(ConfigError, match=message) as error:
        EnvConfig(task=path)
    assert str(error.value).startswith(f"task: {path}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere/task.py", "no_such_module", "no.such.module", "Push-v9", "a..b"])
def test_names_of_nothing_are_refused(name):
    with pytest.raises(UserError, match=f"task: got {name!r}, expected "):
        EnvConfig(task=name)


def test_a_task_without_an_expert_has_no_demonstrations(write):
    path = write(f"{SPEC}TASK = Task(PUSH.spec, PUSH.scene)\n")
    assert EnvConfig(task=path).env_id == "PushCube-v1"
    with pytest.raises(ConfigError, match=r"task: .*my_task.py has no expert, expected one"):
        make_expert(path)


def test_stages_follow_the_task_that_the_command_line_names(monkeypatch):
    """A configuration made for PushCube would otherwise bring that task's thresholds along."""
    from stare_jax.config import from_dict
    from stare_jax.runs.config import RunConfig

    monkeypatch.syspath_prepend(str(ROOT))
    from configs.study_pushcube_state import get_config

    config = get_config()
    config.env.task = str(EXAMPLE)
    config.stages.delta_lift = 0.03
    values = config.to_dict()
    values.pop("name")
    run, own = from_dict(RunConfig, values), load_task(str(EXAMPLE)).spec.params
    assert own.delta_goal != get_task("PushCube-v1").params.delta_goal
    assert run.stages.delta_goal == own.delta_goal and run.stages.beta1 == own.beta1
    assert run.stages.delta_lift == 0.03 and run.env.env_id == "PlaceSphere-v1"

    values["stages"]["beta1"] = 0.9  # fits PushCube's family and not this one, whose grasp has a second weight
    with pytest.raises(ConfigError, match=r"TaskSpec PlaceSphere-v1 \(pick-place\): .*stage 'grasp' could reach"):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("file", "seeds", "goal_height"),
    # The bin's floor is 5 mm, ball and cube are 4 cm thick.
    [(EXAMPLE, (0, 4, 13), 0.025), (OWN_STAGES, (3, 18), 0.17)],
)
def test_the_expert_of_an_example_succeeds_stage_by_stage(file, seeds, goal_height):
    """All of the seeds 0 .. 19 succeed, after 17 to 28 and 11 to 15 actions."""
    config = EnvConfig(task=str(file), image_size=0)
    simulator, expert = Simulator(config), make_expert(config.task_name)
    for seed in seeds:
        memory, signals = expert.init(), [simulator.reset(seed).signals]
        assert signals[0].goal_pos[2] == pytest.approx(goal_height, abs=1e-5)
        while len(signals) <= config.horizon and not signals[-1].success:
            action, memory = expert.act(signals[-1], memory)
            signals.append(simulator.step(action).signals)
        assert signals[-1].success, seed
        stages = separate(config.spec, jax.tree.map(lambda *leaves: np.stack(leaves), *signals)).stage_t[:-1]
        assert sorted(set(stages.tolist())) == list(range(config.spec.num_stages)) and (np.diff(stages) >= 0).all()
    simulator.close()


def test_simulator_processes_find_a_module_on_the_path_of_this_one(tmp_path, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path / "sphere_of_mine.py")
    monkeypatch.syspath_prepend(str(tmp_path))  # and not in PYTHONPATH, which the processes inherit
    config = EnvConfig(task="sphere_of_mine", num_workers=1, envs_per_worker=1, image_size=None)
    with contextlib.closing(make_vec_env(config)) as env:
        state = env.reset([3])
        assert (env.env_id, tuple(env.instructions)) == ("PlaceSphere-v1", ("put the ball into the bin",))
        np.testing.assert_allclose(state.signals.support_z, [0.02], atol=1e-4)


@pytest.mark.slow
def test_every_phase_trains_on_a_task_of_ones_own(tmp_path):
    """The command line, in a folder of the user's, runs demonstrations, SFT, STA-TPO, STA-PPO, evaluation."""
    shutil.copy(EXAMPLE, tmp_path / "place_sphere.py")
    changes = {
        "env.task": "place_sphere.py",
        "env.num_workers": 1,
        "env.envs_per_worker": 4,
        "phases": "('sft', 'tpo', 'ppo')",
        "model.prompt_length": 24,
        "demos.num_demos": 2,
        "sft.num_steps": 2,
        "sft.batch_size": 8,
        "pairs.num_pairs": 2,
        "pairs.max_rollouts": 8,
        "tpo.num_epochs": 1,
        "tpo.batch_size": 1,
        "ppo.num_iterations": 2,
        "ppo.num_episodes": 4,
        "ppo.num_epochs": 1,
        "ppo.minibatch_size": 120,
        "evaluation.num_episodes": 2,
    }
    command = [sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT / 'configs/study_pushcube_state.py'}"]
    command += [f"--config.{name}={value}" for name, value in changes.items()] + ["--workdir=run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    for phase in ("sft", "tpo", "ppo"):
        assert (tmp_path / "run" / phase).is_dir()
    assert "PlaceSphere-v1" in (tmp_path / "run" / "report.html").read_text()
    print(result.stdout[-3000:])


def test_the_documentation_shows_the_file():
    assert f"```python\n{EXAMPLE.read_text()}```" in (ROOT / "docs" / "tasks.md").read_text()


def test_an_instruction_that_does_not_fit_the_prompt_is_refused_before_anything_is_collected(tmp_path):
    from stare_jax.models import openvla_state
    from stare_jax.runs.config import RunConfig
    from stare_jax.runs.ipi import run_ipi

    env = EnvConfig(task=str(EXAMPLE), image_size=0, use_state="low_dim")
    config = RunConfig(env, openvla_state(env.state_dim), env.spec.params)
    with pytest.raises(ConfigError, match="prompt_length: got 12, expected at least 15 for 'put the ball into the"):
        run_ipi(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
