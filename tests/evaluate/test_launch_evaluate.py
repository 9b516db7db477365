import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stare_jax.config import to_dict
from stare_jax.envs import EnvConfig, toy
from stare_jax.evaluate.protocol import EvalConfig
from stare_jax.evaluate.summary import load_evaluation
from stare_jax.models import openvla_tiny
from stare_jax.models.mlp import MLPConfig, make_mlp
from stare_jax.runs import load as restore
from stare_jax.runs.config import RunConfig
from stare_jax.stages import get_task
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.train_state import TrainState


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).parents[2] / "launch/evaluate.py"
    module_spec = importlib.util.spec_from_file_location("launch_evaluate", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, command):
    """A run directory with checkpoints of a small policy, whose simulator is the toy one."""
    directory = tmp_path_factory.mktemp("run")
    evaluation = EvalConfig(num_episodes=7, num_videos=0)
    task = get_task("PushCube-v1")
    config = RunConfig(EnvConfig(num_workers=4), openvla_tiny(), task.params, evaluation=evaluation)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    policy = make_mlp(MLPConfig(), toy.norm_stats())
    params = jax.jit(policy.init)(jax.random.key(0))
    with Checkpoints(directory / "ppo/checkpoints") as checkpoints:
        for step in (1, 2):
            state = TrainState(jnp.int32(step), params, {}, optax.sgd(0.1).init(params))
            checkpoints.save(step, state, norm_stats=toy.norm_stats(), model={}, counters={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "make_policy", lambda config, norm_stats: policy)
        patch.setattr(command, "make_vec_env", lambda config: toy.ToyPush(config.num_envs))
        patch.setattr(command, "get_task", lambda env_id: toy.task_spec())
        yield directory


def test_evaluates_a_phase_of_a_run(command, trained_run, capsys):
    assert command.main([f"--run={trained_run}", "--phase=ppo"]) == 0
    assert command.main([f"--run={trained_run}", "--phase=ppo", "--step=1", "--first-seed=40", "--name=first"]) == 0
    latest, first = (load_evaluation(trained_run / f"eval/{name}.json") for name in ("ppo", "first"))
    np.testing.assert_array_equal(latest.episodes.seed, np.arange(7))
    np.testing.assert_array_equal(first.episodes.seed, np.arange(40, 47))
    out = capsys.readouterr().out
    assert "success at any step" in out and f"report: {trained_run / 'report.html'}" in out
    assert (trained_run / "report.html").exists()


def test_the_command_line_changes_the_runs_own_choice(command):
    arguments = command.parse_arguments(["--run=x", "--phase=ppo", "--first-seed=50", "--temperature=0.5"])
    own = EvalConfig(num_episodes=9, seeds=(1, 2), num_videos=1)
    assert command.eval_config(own, arguments) == EvalConfig(9, 50, (), 0.5, 1)
    untouched = command.parse_arguments(["--run=x", "--phase=ppo"])
    assert command.eval_config(own, untouched) == own


@pytest.mark.parametrize(
    ("own", "arguments", "expected"),
    [
        ({"num_workers": 4}, [], ("cpu", 4, 8)),
        ({"num_workers": 4}, ["--envs-per-worker=2"], ("cpu", 4, 2)),
        ({"num_workers": 4}, ["--backend=cpu"], ("cpu", 4, 8)),
        ({"num_workers": 4}, ["--backend=cuda"], ("cuda", 1, 32)),
        ({"num_workers": 4}, ["--backend=auto"], ("auto", 4, 8)),
        ({"backend": "cuda", "num_workers": 1, "envs_per_worker": 256}, ["--backend=cpu"], ("cpu", 2, 8)),
        (
            {"backend": "cuda", "num_workers": 1, "envs_per_worker": 256},
            ["--backend=cpu", "--workers=8", "--envs-per-worker=4"],
            ("cpu", 8, 4),
        ),
    ],
)
def test_the_command_line_says_where_the_simulators_run(command, own, arguments, expected):
    arguments = command.parse_arguments(["--run=x", "--phase=ppo", *arguments])
    config = command.env_config(EnvConfig(use_state="tcp", **own), arguments)
    assert (config.backend, config.num_workers, config.envs_per_worker) == expected and config.use_state == "tcp"


def test_writes_a_report_again(command, run_directory, capsys):
    assert command.main([f"--report={run_directory}"]) == 0
    assert "ppo − sft" in capsys.readouterr().out


def test_compares_runs(command, run_directory, capsys):
    assert command.main(["--across", str(run_directory), str(run_directory)]) == 0
    rate = 100 * load_evaluation(run_directory / "eval/ppo.json").episodes.success_once.mean()
    assert f"{rate:.1f} ± 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report={}/nowhere"], "nowhere: expected a run directory"),
        (["--run={}", "--phase=sft"], "config.json does not exist"),
    ],
)
def test_says_what_is_missing(command, tmp_path, capsys, arguments, message):
    assert command.main([argument.format(tmp_path) for argument in arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--step=7", "got complete checkpoints of the steps [1, 2], expected step 7"),
        ("--episodes=0", "num_episodes: got 0, expected at least 1"),
        ("--name=a/b", "phase: got 'a/b', expected letters, digits, '_' and '-'"),
    ],
)
def test_says_what_is_wrong_before_it_evaluates(command, trained_run, capsys, argument, message):
    assert command.main([f"--run={trained_run}", "--phase=ppo", argument]) == 1
    assert message in capsys.readouterr().err


def test_a_run_needs_a_phase(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--run=x"])
    assert "--run needs --phase" in capsys.readouterr().err
