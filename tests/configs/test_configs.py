"""Every configuration builds: shapes of model, optimiser and batches, and one traced step of every phase."""

import functools
import importlib
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from full_size_shardings import FOLDER
from ml_collections import config_flags
from train_here import run_train

from configs.presets import base_config
from stare_jax.config import ConfigError, from_dict
from stare_jax.envs import EnvConfig
from stare_jax.models import MLPConfig
from stare_jax.models.blank import blank_policy
from stare_jax.models.preprocess import resize_with_pad
from stare_jax.runs.config import MeshConfig, RunConfig
from stare_jax.runs.plan import plan_run
from stare_jax.sharding.mesh import make_abstract_mesh
from stare_jax.stages import get_task
from stare_jax.train import ppo, sft, tpo

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "quickstart": ("", "tcp", "pi05"),
    "pod_smoke": ("", "pi05", "state"),
    "study_pushcube_state": ("ppo", "sta_ppo_paper", "sta_ppo_zero", "sta_ppo,pi05", "sta_ppo"),
    "study_pushcube_images": ("ppo", "sta_ppo_zero", "ipi"),
    "franka_state": (
        "PushCube-v1,sta_ppo_paper",
        "LiftPegUpright-v1,rl4vla",
        "pi_rl,pi05",
        "PullCube-v1,ipi",
        "all,ipi",
    ),
    "widowx_state": ("PutEggplantInBasketScene-v1,ipi", "all,sta_tpo"),
    "sft_bridge": ("7b", "tiny", "tiny,PutSpoonOnTableClothInScene-v1"),
    "ipi_maniskill": (
        "pi05",
        "pi05,one_gpu",
        "PushCube-v1,full",
        "PullCube-v1,ppo",
        "StackCube-v1,sta_ppo_paper",
        "StackCube-v1,rl4vla",
        "StackCube-v1,pi05,lora",
        "LiftPegUpright-v1",
    ),
    "ipi_widowx": (
        "pi05",
        "PutCarrotOnPlateInScene-v1,one_gpu",
        "pi05,sta_ppo_paper",
        "rl4vla",
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1,pi05,full",
        "PutSpoonOnTableClothInScene-v1,full",
        "PutCarrotOnPlateInScene-v1",
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
        "PutEggplantInBasketScene-v1",
    ),
}


@pytest.fixture(autouse=True)
def configs_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def load(name: str, variant: str) -> RunConfig:
    values = importlib.import_module(f"configs.{name}").get_config(*([variant] if variant else [])).to_dict()
    values.pop("name")
    return from_dict(RunConfig, values)


def test_the_table_above_lists_every_configuration():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"presets", "methods", "devices"}
    assert files == set(VARIANTS)


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, all_ in VARIANTS.items() for variant in all_])
def test_config_is_valid(name, variant):
    config = load(name, variant)
    hurried = name == "quickstart" and variant != "pi05"
    expected = 60 if name in ("ipi_widowx", "widowx_state", "sft_bridge") else 16 if hurried else 30
    assert config.env.horizon == expected
    assert config.stages == load(name, variant).stages


@pytest.mark.parametrize(
    ("name", "word"), [("ipi_maniskill", ""), ("ipi_widowx", ""), ("franka_state", "all"), ("widowx_state", "all")]
)
def test_one_policy_learns_all_tasks_of_its_robot_or_the_one_that_is_named(name, word):
    tasks = importlib.import_module(f"configs.{name}").TASKS
    config = load(name, word)
    assert config.env.task_names == tasks and config.specs == tuple(map(get_task, tasks))
    assert np.ptp(np.bincount(config.env.task_index)) == 0
    for task in tasks:
        alone = load(name, task)
        assert (alone.env.tasks, alone.env.env_id, alone.stages) == ((), task, get_task(task).params)


def test_a_policy_of_the_state_reads_which_of_its_tasks_it_has():
    config = load("franka_state", "all")
    words = [spec.instruction for spec in config.specs]
    tokens, _ = blank_policy(config.model).tokenize(words, np.zeros((4, config.env.state_dim), np.float32))
    assert len({row.tobytes() for row in tokens}) == 4


def test_a_configuration_called_ipi_has_all_three_phases():
    for name in VARIANTS:
        assert (load(name, "").phases == ("sft", "tpo", "ppo")) == (
            name.startswith("ipi") or name in ("quickstart", "pod_smoke")
        )


SHAPINGS = {  # shaping, progressive, terminal potential
    "sta_ppo": (True, True, "keep"),
    "ppo": (False, True, "keep"),
    "sta_ppo_paper": (True, False, "keep"),
    "sta_ppo_zero": (True, True, "zero"),
}


@pytest.mark.parametrize("name", ["study_pushcube_state", "study_pushcube_images", "ipi_maniskill", "ipi_widowx"])
def test_the_method_is_the_one_that_is_asked_for(name):
    """Without a word PPO is STA-PPO with the defaults of the code; time limits are never bootstrapped."""
    for method, expected in SHAPINGS.items():
        config = load(name, "" if method == "sta_ppo" else method)
        assert (config.ppo.shaping, config.stages.progressive, config.ppo.terminal_potential) == expected
        assert config.ppo.time_limit == "terminate"
        if method == "sta_ppo":
            assert config.stages == config.env.specs[0].params == get_task(config.env.task_name).params


def test_rl4vla_is_its_own_reward_without_shaping_in_episodes_of_full_length():
    config = load("ipi_widowx", "rl4vla")
    assert (config.ppo.shaping, config.ppo.reward, config.ppo.stop_at_success) == (False, "rl4vla", False)
    assert load("ipi_widowx", "").ppo.stop_at_success
    # Its reward pays for a grasp, which nobody makes of a cube that is pushed.
    with pytest.raises(ConfigError, match="reward: got 'rl4vla', expected another one for PushCube-v1"):
        load("ipi_maniskill", "PushCube-v1,rl4vla")


@pytest.mark.parametrize("variant", ["", "pi05"])
def test_recipes_clip_values_as_rl4vla_does(variant):
    for name in ("ipi_maniskill", "ipi_widowx"):
        config = load(name, variant)
        assert (config.ppo.value_clip_eps, config.ppo.huber_delta) == (0.2, 10.0)


@pytest.mark.parametrize("devices", ["", "one_gpu"])
@pytest.mark.parametrize("trained", ["", "lora", "full"])
@pytest.mark.parametrize("model", ["", "pi05"])
@pytest.mark.parametrize("name", ["ipi_maniskill", "ipi_widowx"])
def test_words_of_model_weights_and_devices_go_together(name, model, trained, devices):
    words = ",".join(filter(None, (model, trained, devices, "rl4vla" if name == "ipi_widowx" else "grape")))
    if (trained, devices) == ("full", "one_gpu"):
        needed = 81 if model else 150
        with pytest.raises(ValueError, match=f"got one_gpu and full, expected one of them: .* take {needed} GB, of 80"):
            load(name, words)
        return
    config, num_devices = load(name, words), 1 if devices else 8
    assert config.mesh == MeshConfig(1 if devices else -1, 8 if trained == "full" else 1)
    assert config.env.num_envs == 64
    mesh = make_abstract_mesh(data=num_devices // config.mesh.fsdp, fsdp=config.mesh.fsdp)
    for phase, module in (("sft", sft), ("tpo", tpo), ("ppo", ppo)):
        module.check_mesh(getattr(config, phase), mesh)
    # Contexts that are constants are kept: those of the most decisions that there can be.
    is_expert = (model, trained) == ("pi05", "")
    most = config.ppo.num_episodes * -(-config.env.horizon // getattr(config.model, "chunk", 1))
    assert config.ppo.context_gb >= most * 5.6e-3 if is_expert else config.ppo.context_gb == 0


@pytest.mark.parametrize(("trained", "num_bytes"), [("openvla full", 20), ("pi05 full", 24)])
def test_what_training_all_weights_takes_is_counted_from_their_shapes(trained, num_bytes):
    name = {"openvla full": "openvla_7b_full", "pi05 full": "pi05_full"}[trained]
    lines = (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
    sizes = [math.prod(map(int, re.search(r"\[(.*?)\]", line)[1].split(","))) for line in lines]
    assert importlib.import_module("configs.devices").FULL_GB[trained] == round(num_bytes * sum(sizes) / 1e9)


def test_recipes_refuse_two_algorithms():
    with pytest.raises(ValueError, match="variant: got ppo, sta_ppo_paper, expected one of them"):
        load("ipi_widowx", "ppo,sta_ppo_paper")


def test_pi05_sees_the_widowx_camera_between_black_bars_and_openvla_squeezed():
    """The camera is 4:3: of 224 rows openpi leaves 28 black above the view and 28 below."""
    camera = np.full((1, 480, 640, 3), 200, np.uint8)
    expected = np.asarray(resize_with_pad(camera, 224))[0].max(axis=(1, 2)) == 0
    assert expected.sum() == 56
    for variant in ("pi05", "PutSpoonOnTableClothInScene-v1,pi05,full"):
        config = load("ipi_widowx", variant)
        rendered = np.full((1, *config.env.image_shape, 3), 200, np.uint8)
        seen = np.asarray(resize_with_pad(rendered, config.model.image_size))[0]
        np.testing.assert_array_equal(seen.max(axis=(1, 2)) == 0, expected)
        assert config.env.image_shape == (168, 224)
    assert load("ipi_widowx", "").env.image_shape == (224, 224)


# The recipes for the WidowX have the model of those for the Franka arm, and take as long.
PLANNED = [
    pytest.param(name, variants[-1], marks=[pytest.mark.slow] if name == "ipi_widowx" else [])
    for name, variants in VARIANTS.items()
]
PLANNED += [
    ("study_pushcube_state", "sta_ppo,pi05"),
    ("ipi_widowx", "pi05"),
    pytest.param("ipi_maniskill", "StackCube-v1,pi05,lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "variant"), PLANNED)
def test_model_optimizer_and_batches_have_shapes(name, variant):
    config = load(name, variant)
    plans = plan_run(config)
    assert list(plans) == list(config.phases)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(plans["sft"].state.params))
    is_full_size = name in ("ipi_maniskill", "ipi_widowx")
    least, most = (0, 1.5e6) if not is_full_size else (3.3e9, 3.5e9) if "pi05" in variant else (7.4e9, 7.7e9)
    assert least < num_params < most
    for plan in plans.values():
        # Two moments for whatever is trained and perhaps its average, nothing for what is frozen.
        is_lora, is_part = (getattr(config.model, name, None) for name in ("lora", "frozen_patterns"))
        trainable = 112e6 if is_lora else 434e6 if is_part else num_params
        num_moments = sum(leaf.size for leaf in jax.tree.leaves(plan.state.opt_state))
        assert num_moments <= (2 + (config.sft.ema_decay is not None)) * trainable + 10
    if "tpo" in plans:
        num_draws = config.tpo.num_draws if "pi05" in variant else 1
        assert plans["tpo"].batch.chosen.ref_logp.shape == (config.tpo.batch_size, config.env.horizon, num_draws)


def test_an_mlp_is_the_model_of_a_run_like_any_other():
    env = EnvConfig("StackCube-v1", image_size=0, use_state="low_dim")
    model = MLPConfig(env.state_dim, action_dim=7, num_bins=256, hidden_dims=(32, 32), label_width=4.0)
    values = base_config(env, model, name="study").to_dict()
    del values["name"]
    config = from_dict(RunConfig, values)
    assert config.model == model
    plan = plan_run(config)
    assert set(plan) == {"sft", "tpo", "ppo"}
    assert plan["ppo"].state.params["logits"]["kernel"].shape == (32, 7 * 256)


def test_every_setting_that_is_compared_is_a_change_of_the_configuration():
    settings = importlib.import_module("benchmarks.ppo_settings")
    base = parse(settings.config_flags(settings.changes("base"))[1:])
    for name, setting in settings.SETTINGS.items():
        changes = settings.changes(name)
        changed = parse(settings.config_flags(changes)[1:])
        assert (changed != base) == (name != "base" and setting.sft != "raw"), name  # "raw" changes statistics.
        for field, value in changes.items():
            got = functools.reduce(getattr, field.split("."), changed)
            assert got == value and type(got) is type(value), (name, field)


def parse(overrides: list[str]) -> RunConfig:
    values = flags.FlagValues()
    variant = importlib.import_module("benchmarks.ppo_settings").VARIANT
    start = importlib.import_module("configs.study_pushcube_state").get_config(variant)
    arguments = ["train", *overrides]
    holder = config_flags.DEFINE_config_dict("config", start, flag_values=values, sys_argv=arguments)
    values(arguments)
    config = holder.value.to_dict()
    config.pop("name")
    return from_dict(RunConfig, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--config.ppo.num_steps=0"], "num_steps: got 0, expected >= 1 or None"),
        (["--config=configs/nothing.py"], "No such file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_train([*arguments, f"--workdir={tmp_path / 'run'}", "--plan"]) != 0
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
