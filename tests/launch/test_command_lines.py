"""Command lines that do not fit: one clear line before anything is started, and nothing is written."""

import collect
import compare
import convert
import evaluate
import export_lerobot
import import_lerobot
import import_rlds
import numpy as np
import pytest
import show_stages
import study
from train_here import run_train

from stare_jax.data.norm_stats import compute_statistics, write_statistics
from stare_jax.data.schema import Episode, Manifest, Shard, ShardFile, write_manifest
from stare_jax.runs import ipi

STATE = "configs/study_pushcube_state.py"
PI05 = "configs/quickstart.py:pi05"
QUICKSTART = "configs/quickstart.py"
INSTRUCTION = "push the blue cube to the target"


def write_demonstrations(folder, lengths, instruction=INSTRUCTION):
    """Writes what is read of a data set of demonstrations before a run begins: its manifest and its statistics."""
    shapes = {"image/base_camera": [64, 64, 3], "state": [29], "action": [7], "tokens": [0]}
    rows = tuple(Episode(seed, instruction, "expert", 0.0, True, length) for seed, length in enumerate(lengths))
    empty = {"settings": {}, "filters": {}, "packages": {}, "progress": {}}
    files = (ShardFile(name, count, 0, "0" * 64) for name, count in (("f", sum(lengths) + len(rows)), ("e", len(rows))))
    manifest = Manifest(
        "PushCube-v1", "pd_ee_delta_pose", shapes=shapes, shards=(Shard(*files),), episodes=rows, **empty
    )
    write_manifest(folder, manifest)
    rng = np.random.default_rng(0)
    action, state = (rng.normal(size=(max(sum(lengths), 1), size)).astype(np.float32) for size in (7, 29))
    write_statistics(folder, {"PushCube-v1": compute_statistics(action, state, num_trajectories=max(len(lengths), 1))})


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    write_given(folder)
    return folder


def write_given(folder):
    """Fills a folder with things that command lines name, most of them wrong."""
    for name in ("empty", "no_json", "no_tokenizer", "run/sft/checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("x")
    (folder / "run" / "config.json").write_text("{}")
    (folder / "no_json" / "tokenizer.json").write_text("{")
    (folder / "no_tokenizer" / "tokenizer.json").write_text('{"model": 3}')
    (folder / "broken_study.py").write_text("def get_study():\n    return missing\n")
    write_demonstrations(folder / "demos_of_none", [])
    write_demonstrations(folder / "demos_of_no_action", [0, 0])
    write_demonstrations(folder / "demos_of_one_action", [1])
    write_demonstrations(folder / "demos_with_long_words", [5], "zyx " * 20)


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fails where a simulator would be started."""

    def start(config):
        raise AssertionError("a simulator was started")

    replace_start(monkeypatch, start)


def replace_start(monkeypatch, start):
    """Calls `start(config)` where a simulator would be started."""
    for module in (ipi, collect, evaluate, show_stages):
        monkeypatch.setattr(module, "make_vec_env", start)


FITS_NOT = [
    (QUICKSTART, ["model.camera=wrist"], "config.model.cameras: sees the cameras ['wrist'], expected some of ['base"),
    (QUICKSTART, ["env.image_size=0"], "expected some of [], which the simulator of PushCube-v1 has with env.image_"),
    (QUICKSTART, ["env.env_id=PutCarrotOnPlateInScene-v1"], "sees the cameras ['base_camera'], expected some of ['3rd"),
    (PI05, ["model.cameras=('base_camera','base_camera')"], "cameras: got ('base_camera', 'base_camera'), expected ea"),
    (QUICKSTART, ["model.prompt_length=5"], "prompt_length: got 5, expected at least 9 for 'push the blue cube"),
    (QUICKSTART, ["model.action_vocab_end=300"], "action_vocab_end: got 44 ids below the actions, expected >="),
    (
        QUICKSTART,
        ["model.prompt_template={instruction} {x}"],
        "prompt_template: got '{instruction} {x}', expected no fi",
    ),
    (QUICKSTART, ["model.state_dim=3"], "config.model.state_dim: got 3, expected 29, as env.use_state 'low_dim' shows"),
    (STATE, ["env.use_state=none"], "config.model.state_dim: got 29, expected 0, as env.use_state 'none' shows"),
    (QUICKSTART, ["model.action_dim=6"], "config.model.action_dim: got 6, expected 7, as 'pd_ee_delta_pose' takes"),
    (
        QUICKSTART,
        ["env.control_mode=pd_joint_delta_pos"],
        "config.env.control_mode: got 'pd_joint_delta_pos', expected",
    ),
    (QUICKSTART, ["model.resize=area", "env.image_size=32"], "config.model.resize: got 'area' for images of (32, 32)"),
    (QUICKSTART, ["model.image_size=50"], "image_size: got 50, expected a multiple of 16"),
    (QUICKSTART, ["model.tokenizer="], "model.tokenizer: got '', expected a folder of a checkpoint; there is none"),
    (QUICKSTART, ["model.tokenizer=GIVEN/nowhere"], "nowhere', expected a folder of a checkpoint; there is none"),
    (QUICKSTART, ["model.tokenizer=GIVEN/empty"], "empty' without a tokenizer.json, expected a checkpoint's folder"),
    (QUICKSTART, ["model.tokenizer=GIVEN/no_json"], "no_json', whose files are no tokenizer (JSONDecodeError: "),
    (QUICKSTART, ["model.tokenizer=GIVEN/no_tokenizer"], "no_tokenizer', whose files are no tokenizer ("),
    (PI05, ["env.horizon=2"], "config.model.chunk: got 3, expected at most 2, the actions of an episode"),
    (PI05, ["ppo.num_steps=2"], "config.ppo.num_steps: got 2, expected at least 3, the actions of one decision"),
    (QUICKSTART, ["pairs.max_rollouts=3"], "max_rollouts: got 3, expected at least rollouts_per_seed 4"),
    (QUICKSTART, ["ppo.num_iterations=99999"], "config.ppo.num_iterations x num_episodes: got "),
    (QUICKSTART, ["demos.num_demos=2000000"], "config.demos.num_demos: got 2,000,000, expected at most 1,000,000, the"),
    (
        QUICKSTART,
        ["env.backend=cuda", "env.num_workers=1"],
        "config.env.backend: got 'cuda', and JAX computes on 'cpu'",
    ),
    (QUICKSTART, ["demos_from=GIVEN/empty"], "empty is not a data set: it has no manifest.json"),
    (QUICKSTART, ["demos_from=GIVEN/demos_of_none"], "demos_of_none: got 0 episodes without an action, expected"),
    (QUICKSTART, ["demos_from=GIVEN/demos_of_no_action"], "demos_of_no_action: got 2 episodes without an action"),
    (QUICKSTART, ["demos_from=GIVEN/demos_of_one_action"], "norm_stats: got q01 equal to q99 in all action dimensions"),
    (QUICKSTART, ["demos_from=GIVEN/demos_with_long_words"], "prompt_length: got 12, expected at least "),
    (QUICKSTART, ["init_from=GIVEN/file"], "file', expected a folder; there is none"),
    (QUICKSTART, ["init_from=GIVEN/empty"], "empty: got nothing, expected an OpenVLA checkpoint"),
    (QUICKSTART, ["init_from=GIVEN/run"], "expected an OpenVLA checkpoint"),
    (QUICKSTART, ["init_from=GIVEN/run/sft"], "complete checkpoint"),
]


@pytest.mark.parametrize(("config", "fields", "message"), FITS_NOT, ids=[f"{fields[0]}" for _, fields, _ in FITS_NOT])
def test_a_run_that_does_not_fit_its_task_is_refused(nothing_starts, given, tmp_path, capfd, config, fields, message):
    before = {path: path.stat().st_mtime_ns for path in given.rglob("*")}
    arguments = [f"--config.{field.replace('GIVEN', str(given))}" for field in fields]
    code = run_train([f"--config={config}", *arguments, f"--workdir={tmp_path / 'run'}"])
    error = capfd.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in given.rglob("*")} == before


def test_a_plan_is_refused_where_the_run_is_but_not_for_devices_that_it_has_elsewhere(capfd):
    elsewhere = ["--config.env.backend=cuda", "--config.env.num_workers=1"]
    assert run_train([f"--config={PI05}", *elsewhere, "--config.ppo.num_steps=2", "--plan"]) == 1
    assert capfd.readouterr().err.startswith("error: config.ppo.num_steps: got 2, expected at least 3, the actions")


EXPERT = [f"--config={QUICKSTART}", "--phase=expert", "--workdir=OUT"]
SERVED = [f"--config={QUICKSTART}", "--workdir=OUT", "--policy=http://127.0.0.1:9"]
OTHERS = [
    (evaluate, SERVED, "http://127.0.0.1:9: ConnectionRefusedError: "),
    (evaluate, [*SERVED[:2], "--policy=localhost:9"], "localhost:9: expected ws://HOST:PORT, or http://HOST:PORT"),
    (evaluate, [*SERVED, "--adapter=GIVEN/no.yaml"], "no.yaml"),
    (evaluate, [*SERVED, "--adapter=GIVEN/file"], "file: got str, expected fields of an adapter and their values"),
    (evaluate, [*SERVED, "--adapter=configs/policies/openpi_droid.yaml"], "control: got 'joint_velocity', expected"),
    (evaluate, [*EXPERT, "--config.env.control_mode=pd_joint_delta_pos"], "config.env.control_mode: got 'pd_joint_"),
    (evaluate, [*EXPERT, "--temperature=nan"], "temperature: got nan, expected a finite number >= 0"),
    (evaluate, [*EXPERT, "--num-episodes=-3"], "num_episodes: got -3, expected in [0, 1000000]"),
    (evaluate, [*EXPERT, "--num-episodes=2147483647"], "num_episodes: got 2147483647, expected in [0, 1000000]"),
    (evaluate, [*EXPERT, "--first-seed=-1"], "first_seed: got -1, expected >= 0"),
    (evaluate, [*EXPERT, "--workers=0"], "num_workers: got 0, expected >= 1"),
    (evaluate, [*EXPERT, "--step=-1"], "argument --step: got -1, expected >= 0"),
    (evaluate, ["--run=GIVEN/empty", "--phase=ppo"], "empty: expected a run directory"),
    (evaluate, [f"--config={QUICKSTART}", "--weights=GIVEN/empty", "--workdir=OUT"], "empty"),
    (collect, ["--out=OUT", "--demos=4", "--limit=nan"], "limit: got nan, expected 0 < limit <= 1"),
    (collect, ["--out=OUT", "--demos=4", "--noise=nan"], "noise_scales[0][0]: got nan, expected a finite number >= 0"),
    (collect, ["--out=OUT", "--demos=4", "--noise=0.1:inf"], "noise_scales[0][1]: got inf, expected a finite number"),
    (collect, ["--out=OUT", "--demos=4", "--image-width=0"], "image_width: got 0, expected >= 1"),
    (collect, ["--out=OUT", "--demos=4", "--task=GIVEN/no.py"], "no.py', expected a Python file; there is none"),
    (collect, ["--out=OUT", "--pairs=4", "--pair-noise=nan"], "noise_scale: got nan, expected more than 0"),
    (collect, ["--out=OUT", "--pairs=4", "--pair-noise=inf"], "noise_scale: got inf, expected more than 0"),
    (collect, ["--out=OUT", "--pairs=4", "--temperature=nan"], "temperature: got nan, expected a finite number > 0"),
    (collect, ["--out=OUT", "--pairs=4", "--max-rollouts=1"], "max_rollouts: got 1, expected at least rollouts_per_se"),
    (collect, ["--out=OUT", "--pairs=4", "--weights=GIVEN/empty/sft"], "empty: expected a run directory"),
    (collect, ["--out=OUT", "--pairs=4", "--mesh.fsdp=0"], "argument --mesh.fsdp: got 0, expected >= 1"),
    (show_stages, ["--task=PushCube-v1", "--out=OUT", "--image-size=0"], "argument --image-size: got 0, expected >= 1"),
    (show_stages, ["--task=PushCube-v1", "--out=OUT", "--seed=-1"], "argument --seed: got -1, expected >= 0"),
    (show_stages, ["--task=NoTask-v1", "--out=OUT"], "task: got 'NoTask-v1', expected one of"),
    (convert, ["--from=GIVEN/nowhere", "--to=OUT"], "nowhere"),
    (convert, ["--from=GIVEN/empty", "--to=OUT"], "empty: "),
    (
        convert,
        ["--from=GIVEN/empty", "--to=OUT", "--max-shard-gb=inf"],
        "--max-shard-gb: got inf, expected a finite numb",
    ),
    (convert, ["--from=GIVEN/empty", "--to=OUT", "--action-dim=0"], "argument --action-dim: got 0, expected >= 1"),
    (convert, ["--from=GIVEN/empty", "--to=OUT", "--state-dim=-1"], "argument --state-dim: got -1, expected >= 0"),
    (convert, ["--from=GIVEN/empty", "--to=OUT", "--seed=-1"], "argument --seed: got -1, expected >= 0"),
    (convert, ["--from=GIVEN/empty", "--to=OUT", "--mesh.tensor=x"], "argument --mesh.tensor: invalid int value: 'x'"),
    (export_lerobot, ["--data=GIVEN/nowhere", "--out=OUT", "--fps=5"], "nowhere is not a data set"),
    (export_lerobot, ["--data=GIVEN/demos_of_none", "--out=OUT", "--fps=0"], "fps: got 0, expected >= 1"),
    (import_lerobot, ["--data=GIVEN/empty", "--out=OUT"], "empty is no LeRobotDataset: it has no meta/info.json"),
    (import_lerobot, ["--data=GIVEN/empty", "--out=OUT", "--stages=a;a"], "stages: got 'a' twice"),
    (import_rlds, ["--data=GIVEN/nowhere", "--out=OUT"], "nowhere"),
    (import_rlds, ["--data=GIVEN/empty", "--out=OUT"], "empty"),
    (import_rlds, ["--data=GIVEN/empty", "--out=OUT", "--image-size=0"], "image_size: got 0, expected >= 1"),
    (import_rlds, ["--data=GIVEN/empty", "--out=OUT", "--limit=-1"], "limit: got -1, expected >= 1 or None"),
    (
        import_rlds,
        ["--data=GIVEN/empty", "--out=OUT", "--gripper=nan:1"],
        "--gripper: got 'nan:1', expected CLOSED:OPEN",
    ),
    (compare, ["--out=OUT", "A=GIVEN/empty"], "empty"),
    (compare, ["--out=OUT", "A=GIVEN/empty", "--target=nan"], "target: got nan, expected in (0, 1]"),
    (compare, ["--out=OUT", "A=GIVEN/empty", "--smooth=0"], "--smooth: got 0, expected >= 1"),
    (
        compare,
        ["--out=OUT", "A=GIVEN/empty", "--smooth=" + "1" * 30],
        "1, expected at most 2147483647",
    ),
    (compare, ["--out=OUT", "--study=GIVEN/empty"], "empty"),
    (study, ["--study=GIVEN/file", "--workdir=OUT"], "file, expected a Python file that defines get_study(); it has"),
    (evaluate, ["--config=GIVEN/file", "--phase=expert", "--workdir=OUT"], "file', expected a Python file of configs/"),
    (study, ["--study=GIVEN/no.py", "--workdir=OUT"], "no.py, expected a Python file that defines get_study()"),
    (
        study,
        ["--study=GIVEN/broken_study.py", "--workdir=OUT"],
        "broken_study.py, line 2: name 'missing' is not defined",
    ),
    (study, ["--study=STUDY", "--workdir=OUT", "--jobs=0"], "argument --jobs: got 0, expected >= 1"),
    (study, ["--study=STUDY", "--workdir=OUT", "--cores=-1"], "argument --cores: got -1, expected >= 1"),
    (study, ["--study=STUDY", "--workdir=OUT", "--nice=20"], "argument --nice: got 20, expected in [0, 19]"),
    (study, ["--study=STUDY", "--workdir=OUT", "--every=nan"], "argument --every: got nan, expected a finite number >"),
    (
        study,
        ["--study=STUDY", "--workdir=OUT", "--config.model.state_dim=3"],
        "config.model.state_dim: got 3, expected 29",
    ),
]


@pytest.mark.parametrize(
    ("command", "arguments", "message"), OTHERS, ids=[f"{module.__name__} {line[-1]}" for module, line, _ in OTHERS]
)
def test_no_other_command_starts_what_does_not_fit(nothing_starts, given, tmp_path, capfd, command, arguments, message):
    names = {"GIVEN": str(given), "OUT": str(tmp_path / "out"), "STUDY": "configs/studies/franka_state.py"}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    try:
        code = command.main(arguments)
    except SystemExit as stopped:  # of argparse, which says how the command is used above the line
        code = stopped.code
    error = capfd.readouterr().err
    *usage, line = error.strip().splitlines()
    assert code in (1, 2) and "error: " in line and message in line, error
    assert not usage or code == 2 and usage[0].startswith("usage: "), error
    assert list(tmp_path.iterdir()) == []
