"""The command line of collection, on the toy environment dressed up as a task with images and a gripper, and on the
simulator without images."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import collect as command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from stare_jax.config import ConfigError, to_dict
from stare_jax.data.filters import imitation_frames
from stare_jax.data.pairs import PairsConfig, read_pairs
from stare_jax.data.reader import Dataset
from stare_jax.envs import EnvConfig, Expert, make_vec_env, toy
from stare_jax.envs.maniskill.perturbations import PARAPHRASES
from stare_jax.envs.seeds import DEMO_SEEDS, PAIR_SEEDS, SLOT_SIZE
from stare_jax.models import make_policy, openvla_tiny
from stare_jax.models.normalize import identity_stats
from stare_jax.runs import load as restore
from stare_jax.runs.config import RunConfig
from stare_jax.runs.load import load_config
from stare_jax.stages import get_task
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.train_state import TrainState

CUBES = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"


class DressedToy(toy.ToyPush):
    env_id = "PushCube-v1"
    action_dim = 7

    def send(self, action, reset_seeds=None, **options):
        super().send(action[:, :2], reset_seeds, **options)

    def close(self):
        pass

    def _observe(self, measured):
        step = super()._observe(measured)
        images = {"base_camera": np.full((self.num_envs, 64, 64, 3), 200, np.uint8)}
        observation = step.observation._replace(images=images, state=step.observation.state[:, :3])
        return step._replace(observation=observation)


class OneStuck(DressedToy):
    """Whatever is decided, the first of two environments does what the expert would, and the second nothing."""

    def send(self, action, reset_seeds=None, **options):
        guided = np.zeros_like(action)
        guided[0, :2] = toy.expert_action(self._signals)[0]
        super().send(guided, reset_seeds, **options)

    def _observe(self, measured):
        step = super()._observe(measured)
        self._signals = step.signals
        return step


def _act(signals, memory):
    action = np.zeros(7, np.float32)
    action[:2] = toy.expert_action(type(signals)(*(leaf[None] for leaf in signals)))[0]
    return action, memory


@pytest.fixture
def collect(monkeypatch, tmp_path):
    """Runs the command in this process, with OUT = tmp_path."""
    monkeypatch.setattr(command, "make_vec_env", lambda config: DressedToy(config.num_envs))
    monkeypatch.setattr(command, "make_expert", lambda env_id, *, limit: Expert(lambda: None, _act, (1.0,) * 7))
    return lambda *arguments: command.main([*arguments, f"--out={tmp_path}"])


def test_demonstrations_are_collected_reported_and_continued(collect, tmp_path, capsys, monkeypatch):
    assert collect("--demos=4", "--noise=0:1,0.2:1", "--workers=2", "--seed=3") == 0
    printed = capsys.readouterr().out
    for words in ("with noise 0.2", "reach", "push", "episodes.png"):
        assert words in printed
    dataset = Dataset(tmp_path / "demos")
    assert [episode.noise_scale for episode in dataset.episodes] == [0.0, 0.0, 0.2, 0.2]
    assert min(episode.seed for episode in dataset.episodes) == DEMO_SEEDS + 3 * SLOT_SIZE
    assert dataset.manifest.control_mode == "pd_ee_delta_pose"
    assert dataset.manifest.settings == {
        "source": "expert",
        "seed": 3,
        "reproducible": True,
        "noise_scales": [[0.0, 0.5], [0.2, 0.5]],
        "horizon": 30,
        "backend": "cpu",
        "camera": "base_camera",
        "image_shape": [64, 64],
        "lite_robot": True,
        "use_state": "none",
        "jitter": "none",
        "gripper_threshold": None,
        "limit": 1.0,
    }
    with Image.open(tmp_path / "demos" / "episodes.png") as sheet:
        assert sheet.size == (8 * 128, 4 * 142)

    with monkeypatch.context() as patch:
        patch.setattr(command, "make_vec_env", None)  # no simulator is started for what is there already
        assert collect("--demos=4", "--noise=0:3,0.2:3", "--seed=3") == 0
    assert "holds all of these already" in capsys.readouterr().out
    assert collect("--demos=6", "--noise=0:1,0.2:1", "--seed=3") == 0
    assert Dataset(tmp_path / "demos").num_episodes == 6


def test_an_interruption_says_how_to_go_on(collect, tmp_path, capsys, monkeypatch):
    class Interrupted(command.Interruption):
        requested = property(lambda self: True, lambda self, value: None)

    with monkeypatch.context() as patch:
        patch.setattr(command, "Interruption", Interrupted)
        assert collect("--demos=4") == 130
    printed = capsys.readouterr().out
    assert "0 of 4 are safe" in printed and "go on with: " in printed and f"--demos=4 --out={tmp_path}" in printed
    assert collect("--demos=4") == 0
    assert Dataset(tmp_path / "demos").num_episodes == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demos=0"], "num_demos: got 0, expected >= 1"),
        (["--demos=4", "--seed=-1"], "seed: got -1, expected in \\[0, 99\\]"),
        (["--demos=4", "--workers=0"], "num_workers: got 0, expected >= 1"),
        (["--demos=4", "--noise=0.1:-1"], "noise_scales.* got -1.0, expected > 0"),
        (["--demos=4", "--image-width=0"], "image_width: got 0, expected >= 1"),
        (["--demos=4", "--task=PushCube"], "task: got 'PushCube', expected one of StackCube-v1"),
        (["--pairs=4", "--pair-noise=0"], "noise_scale: got 0.0, expected more than 0"),
        (
            ["--pairs=4", "--checkpoint=nowhere/sft"],
            r"nowhere: expected a run directory.*config\.json does not exist",
        ),
    ],
)
def test_mistakes_are_explained_without_a_traceback(collect, capsys, arguments, message):
    assert collect(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to collect"),
        (["--demos=4", "--pairs=4", "--skip-broken"], "--skip-broken is for --demos alone: pairs name rollouts"),
        (["--pairs=4", "--step=3"], "--step goes with --weights"),
        (["--demos=4", "--weights=runs/x/sft"], "--weights goes with --pairs=N, whose rollouts the policy makes"),
        (["--task=all", "--pairs=4", "--checkpoint=runs/x/sft"], "--weights goes with --pairs=N"),
        (["--demos=4", "--jitter=1m"], "argument --jitter: invalid choice: '1m'"),
        (["--demos=4", "--noise=a"], "got 'a', expected SCALE:SHARE"),
        (["--demos=4", "--episodes=3"], "unrecognized arguments: --episodes=3"),
    ],
)
def test_usage(collect, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        collect(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_data_of_another_kind_are_not_mixed(collect, capsys):
    assert collect("--demos=2") == 0
    for changes, message in (
        (["--seed=1"], "settings.seed is 0, not 1"),
        (["--noise=0.2"], "settings.noise_scales is [[0.0, 1.0]], not [[0.2, 1.0]]"),
        (["--no-reproducible"], "settings.reproducible is True, not False"),
        (["--horizon=40"], "settings.horizon is 30, not 40"),
        (["--limit=0.5"], "settings.limit is 1.0, not 0.5"),
        (["--image-width=80"], "settings.image_shape is [64, 64], not [64, 80]"),
        (["--state=tcp"], "settings.use_state is 'none', not 'tcp'"),
    ):
        assert collect("--demos=3", *changes) == 1
        assert f"cannot be continued: its {message}; choose another folder" in capsys.readouterr().err


def test_a_broken_shard_is_named(collect, tmp_path, capsys, monkeypatch):
    assert collect("--demos=2") == 0
    shard = tmp_path / "demos" / "frames-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    for number in (2, 3):  # before a simulator is started for what is missing
        monkeypatch.setattr(command, "make_vec_env", None)
        assert collect(f"--demos={number}") == 1
        error = capsys.readouterr().err
        assert re.search(r"error: .*frames-00000\.array_record is damaged: got \d+ bytes.*--skip-broken", error)


def test_a_broken_shard_is_left_out_if_asked_for(collect, tmp_path, capsys, caplog):
    assert collect("--demos=2") == 0
    assert collect("--demos=3") == 0
    shard = tmp_path / "demos" / "frames-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    capsys.readouterr()
    assert collect("--demos=3", "--skip-broken") == 0
    assert "frames-00000.array_record is damaged" in caplog.text and "leaving out its 2 episodes" in caplog.text
    printed = capsys.readouterr().out
    assert re.search(r"episodes +1\n", printed) and re.search(r"episodes lost in damaged shards +2\n", printed)
    assert "2 episodes lost in damaged shards; they are not collected again" in printed
    assert '"num_trajectories": 1' in (tmp_path / "demos" / "norm_stats.json").read_text()


def test_a_task_has_its_own_horizon_and_images():
    def env_config(*arguments, base=command.ENV):
        return command.env_config(command.parse_arguments([*arguments, "--demos=1", "--out=data"]), base)

    assert (env_config().horizon, env_config(f"--task={CUBES}").horizon) == (30, 60)
    assert env_config(f"--task={CUBES}", "--horizon=7").horizon == 7
    assert env_config(base=EnvConfig(CUBES, horizon=20)).horizon == 20
    config = env_config(f"--task={CUBES}", "--image-size=48", "--image-width=64", "--jitter=none")
    assert config.image_shape == (48, 64)
    assert config.data_settings == {
        "camera": "3rd_view_camera",
        "image_shape": [48, 64],
        "use_state": "none",
        "jitter": "none",
        "backend": "cpu",
        "lite_robot": None,
        "gripper_threshold": None,
    }
    drawn = env_config(f"--task={CUBES}", "--image-size=48", "--render-size=96", "--resize=bilinear").data_settings
    assert (drawn["image_shape"], drawn["drawn_shape"], drawn["resize"]) == ([48, 48], [96, 128], "bilinear")
    assert env_config("--image-size=0").data_settings["camera"] is None
    assert env_config("--image-size=0").data_settings["lite_robot"] is None
    assert env_config(base=EnvConfig(lite_robot=False)).data_settings["lite_robot"] is False
    assert env_config(f"--task={CUBES}").data_settings["jitter"] == "15mm-15deg"


def test_help_shows_examples_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "python launch/collect.py --task=PushCube-v1 --demos=100" in printed and "default: 400" in printed


@pytest.fixture
def run(tmp_path):
    """A run directory with a policy whose weights are all zero: its actions are uniform."""
    model = openvla_tiny(state_dim=3, camera="base_camera", decode_unroll=1)
    towers = {name: dataclasses.replace(getattr(model, name), depth=2) for name in ("dino", "siglip")}
    model = dataclasses.replace(model, **towers, llm=dataclasses.replace(model.llm, depth=1))
    config = RunConfig(EnvConfig(use_state="tcp"), model, stages=get_task("PushCube-v1").params)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    save(tmp_path / "run", config, step=1)
    return tmp_path / "run"


def save(directory, config, *, step):
    stats = identity_stats(7, 3)
    shapes = jax.eval_shape(make_policy(config.model, stats).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    with Checkpoints(directory / "sft" / "checkpoints") as checkpoints:
        state = TrainState(jnp.int32(step), params, {}, jnp.float32(0))
        checkpoints.save(step, state, norm_stats=stats, model={}, counters={})


def test_pairs_from_a_checkpoint(collect, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "make_vec_env", lambda config: OneStuck(config.num_envs))
    arguments = ["--pairs=9", f"--checkpoint={run / 'sft'}", "--rollouts-per-seed=4", "--max-rollouts=4"]
    assert collect(*arguments) == 0
    printed = capsys.readouterr().out
    pairs = read_pairs(tmp_path / "pairs")
    assert pairs and {pair.kind for pair in pairs} == {"success, same start"}
    assert f"these are {len(pairs)} of 9" in printed and re.search(rf"success, same start +{len(pairs)}\n", printed)
    dataset = Dataset(tmp_path / "pairs")
    assert dataset.num_episodes == 4 and re.fullmatch("sft/1/[0-9a-f]{12}", dataset.manifest.settings["source"])
    assert dataset.frame(0)["token_mask"].any()

    assert collect(*arguments, "--image-size=32") == 1
    assert "was trained with another image_shape" in capsys.readouterr().err
    assert collect(*arguments, "--render-size=128") == 1
    assert "was trained with another drawn_shape" in capsys.readouterr().err
    assert collect(*arguments, "--workers=1") == 1  # What a policy samples depends on how many environments there are.
    assert "its settings.num_envs is 16, not 8" in capsys.readouterr().err


def test_a_policy_reads_the_words_of_the_simulator_that_it_was_trained_in(run, monkeypatch):
    config = load_config(run)
    env = dataclasses.replace(config.env, perturbation="semantics/words")
    (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, env=env))))
    read = []

    def load_policy(folder, *, instructions, **options):
        read.extend(instructions)
        raise ConfigError("enough")

    monkeypatch.setattr(restore, "load_policy", load_policy)
    arguments = command.parse_arguments(["--pairs=9", f"--checkpoint={run / 'sft'}", "--out=x"])
    actor = command.policy_source(arguments, PairsConfig())[-1]
    with pytest.raises(ConfigError, match="enough"):
        actor.act([0])
    assert tuple(read) == PARAPHRASES["PushCube-v1"]


def test_a_checkpoint_is_the_same_wherever_it_lies_and_no_other_weights_are(
    collect, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "make_vec_env", lambda config: OneStuck(config.num_envs))
    arguments = ["--pairs=9", "--rollouts-per-seed=4", "--max-rollouts=4"]
    assert collect(*arguments, f"--checkpoint={run / 'sft'}") == 0
    shutil.copytree(run, tmp_path / "moved")
    save(tmp_path / "other", load_config(run), step=1)
    shutil.copy(run / "config.json", tmp_path / "other")
    monkeypatch.setattr(command, "make_vec_env", None)  # neither simulators
    monkeypatch.setattr(restore, "load_policy", None)  # nor weights are needed for what is there
    monkeypatch.chdir(tmp_path)
    for same in ("run/sft", "moved/sft/"):
        assert collect(*arguments, f"--checkpoint={same}") == 0
        assert "holds all of these already" in capsys.readouterr().out
    assert collect(*arguments, "--checkpoint=other/sft") == 1
    assert re.search(r"its settings.source is 'sft/1/\w+', not 'sft/1/\w+'", capsys.readouterr().err)
    # A run that goes on has other weights; those of before are still named by their step.
    save(run, load_config(run), step=2)
    assert collect(*arguments, "--checkpoint=run/sft") == 1
    assert "not 'sft/2/" in capsys.readouterr().err
    assert collect(*arguments, "--checkpoint=run/sft", "--step=1") == 0
    assert collect(*arguments, "--checkpoint=run/sft", "--step=3") == 1
    assert "got complete checkpoints of the steps [1, 2], expected step 3" in capsys.readouterr().err


def test_a_checkpoint_from_the_gpu_has_no_reproducible_resets(collect, run, capsys):
    config = load_config(run)
    env = dataclasses.replace(config.env, backend="cuda", num_workers=1)
    (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, env=env))))
    assert collect("--pairs=9", f"--checkpoint={run / 'sft'}") == 1
    assert "was trained with env.backend 'cuda': give --no-reproducible" in capsys.readouterr().err


def test_a_policy_acts_on_the_mesh_that_is_asked_for(collect, run, capsys):
    assert collect("--pairs=9", f"--checkpoint={run / 'sft'}", "--mesh.fsdp=64") == 1
    assert "mesh: got data x fsdp x tensor" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_devices_share_the_rows_of_a_policy(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(command.__file__).parent), str(here.parent / "runs"), *sys.path]),
    }
    script = [sys.executable, str(here / "collect_on_eight_devices.py"), str(tmp_path)]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    # 4 environments are filled up to 8 rows where the mesh is the run's own, which takes all devices.
    expected = {"all": {"status": 0, "rows": [1, 8]}, "one": {"status": 0, "rows": [4, 4]}}
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_pairs_from_the_expert(collect, tmp_path, capsys):
    assert collect("--pairs=3", "--rollouts-per-seed=3") == 0
    assert "success, same start" in capsys.readouterr().out
    assert len(read_pairs(tmp_path / "pairs")) == 3
    dataset = Dataset(tmp_path / "pairs")
    settings = dataset.manifest.settings
    assert (settings["source"], settings["noise_scale"], settings["rollouts_per_seed"]) == ("expert", 1.0, 3)
    assert [episode.seed for episode in dataset.episodes[:3]] == [PAIR_SEEDS] * 3
    assert [(episode.noise_scale, episode.attempt) for episode in dataset.episodes[:3]] == [(0, 0), (0.5, 1), (1, 2)]
    assert collect("--pairs=3", "--rollouts-per-seed=3", "--pair-noise=0.5") == 1
    assert "its settings.noise_scale is 1.0, not 0.5" in capsys.readouterr().err


def test_what_is_complete_starts_no_simulator(collect, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "TASKS", ("PushCube-v1",))
    arguments = ("--task=all", "--demos=2", "--pairs=2", "--rollouts-per-seed=3")
    assert collect(*arguments) == 0
    monkeypatch.setattr(command, "make_vec_env", None)
    capsys.readouterr()
    assert collect(*arguments) == 0
    assert capsys.readouterr().out.count("holds all of these already") == 2
    shard = tmp_path / "PushCube-v1" / "pairs" / "frames-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert collect(*arguments) == 1
    error = capsys.readouterr().err
    assert "frames-00000.array_record is damaged" in error and "pairs need every rollout" in error


# ---- The simulator ---------------------------------------------------------------------------------------------------

SMALL = ("--image-size=0", "--workers=1", "--envs-per-worker=1")


def test_demonstrations_and_pairs_of_a_widowx_task(widowx_assets, tmp_path, capsys):
    arguments = [f"--task={CUBES}", "--rollouts-per-seed=2", "--max-rollouts=2", f"--out={tmp_path}", *SMALL]
    arguments.append("--linger=10")
    assert command.main([*arguments, "--demos=2", "--pairs=1"]) == 0
    demos, pairs = Dataset(tmp_path / "demos"), Dataset(tmp_path / "pairs")
    assert [(episode.seed, episode.success) for episode in demos.episodes] == [
        (DEMO_SEEDS, True),
        (DEMO_SEEDS + 1, True),
    ]
    assert max(episode.length for episode in demos.episodes) <= 60 == demos.manifest.settings["horizon"]
    assert demos.manifest.settings["jitter"] == pairs.manifest.settings["jitter"] == "15mm-15deg"
    assert demos.manifest.filters == {"idle": {"translation": 0.0005, "rotation": 0.021}}
    # Idle is little beside a step of 5 cm: the wait above the placed cube, not the approach.
    assert 0.7 < len(imitation_frames(demos)) / (demos.num_frames - 2) < 1
    ((chosen, rejected, kind),) = read_pairs(tmp_path / "pairs")
    assert kind.endswith("same start") and pairs.episodes[chosen].success > pairs.episodes[rejected].success

    capsys.readouterr()
    assert command.main([*arguments, "--demos=2", "--jitter=none"]) == 1
    assert "settings.jitter is '15mm-15deg', not 'none'" in capsys.readouterr().err


@pytest.mark.slow
def test_all_tasks_one_after_another_and_what_is_missing(collect, tmp_path, capsys, monkeypatch):
    def make(config):
        return make_vec_env(config) if config.env_id == CUBES else DressedToy(config.num_envs)

    monkeypatch.setattr(command, "make_vec_env", make)
    monkeypatch.setattr(command, "TASKS", (CUBES, "PushCube-v1"))
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "nothing"))
    assert collect("--task=all", "--demos=1", "--pairs=1", *SMALL) == 1
    error = capsys.readouterr().err
    assert f"error: {CUBES}: simulator process 0" in error and f"1 of 2 tasks are not complete: {CUBES}" in error
    assert "python -m mani_skill.utils.download_asset bridge_v2_real2sim" in error and "Traceback" not in error
    assert Dataset(tmp_path / "PushCube-v1" / "demos").num_episodes == 1
    assert len(read_pairs(tmp_path / "PushCube-v1" / "pairs")) == 1
