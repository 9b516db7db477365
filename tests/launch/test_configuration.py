"""Configurations that a command line chooses and changes: every mistake is one line, without the names of classes."""

import subprocess
import sys
from pathlib import Path

import command
import pytest
from configuration import load_configuration, split_fields
from train_here import run_train

from stare_jax.config import ConfigError, from_dict
from stare_jax.runs.config import RunConfig

ROOT = Path(command.ROOT)
QUICKSTART = str(ROOT / "configs/quickstart.py")


def test_fields_are_told_from_other_flags():
    arguments = ["--config=a.py", "--config.seed=1", "--plan", "--config.ppo.gamma", "0.9", "--noconfig.ppo.shaping"]
    fields, others = split_fields([*arguments, "rest"])
    assert fields == ["--config.seed=1", "--config.ppo.gamma", "0.9", "--noconfig.ppo.shaping", "rest"]
    assert others == ["--config=a.py", "--plan"]


def test_fields_of_all_kinds_are_set():
    fields = ["--config.seed=3", "--config.ppo.gamma", "0.5", "--noconfig.ppo.shaping", "--config.phases=sft,ppo"]
    fields += ["--config.env.horizon=12", "--config.ppo.kl_coef=0.1", "--config.demos.noise_scales=((0.2, 1.0),)"]
    values = load_configuration(f"{QUICKSTART}:tcp", fields)
    assert values.pop("name") == "quickstart_tcp"
    config = from_dict(RunConfig, values)
    assert (config.seed, config.ppo.seed, config.ppo.gamma, config.ppo.shaping) == (3, 3, 0.5, False)
    assert config.phases == ("sft", "ppo") and config.env.horizon == 12 and config.ppo.kl_coef == 0.1
    assert config.demos.noise_scales == ((0.2, 1.0),) and config.env.use_state == "tcp"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "--config.ppo.gama=0.9",
            "--config.ppo.gama: there is no field 'gama' in config.ppo. Did you mean --config.ppo",
        ),
        (
            "--config.pppo.gamma=0.9",
            "--config.pppo.gamma: there is no field 'pppo' in config. Did you mean --config.ppo",
        ),
        ("--config.seed.x=1", "--config.seed.x: there is no field 'x' in config.seed."),
        ("--config.zzz=1", "--config.zzz: there is no field 'zzz' in config."),
        ("--config.ppo.gamma=much", "config.ppo.gamma=much: "),
        ("--config.ppo.num_steps=1.5", "config.ppo.num_steps=1.5: "),
        ("--config.ppo.gamma=nan", "config.ppo.gamma: got nan, expected a finite number in [0, 1]"),
        (
            "--config.ppo=5",
            "--config.ppo=5: got a value for a section, expected one for a field: --config.ppo.",
        ),
        ("--config.name=../x", "config.name: got '../x', expected letters, digits"),
        ("--config.init_from=~nobody_at_all/sft", "config.init_from: got '~nobody_at_all/sft', expected a path"),
        ("--config.model.dino=", "--config.model.dino=: got a value for a section, expected one for a field: "),
        ("--config.model.lora=3", "--config.model.lora=3: got a value for a section, which this"),
    ],
)
def test_a_field_that_is_not_there_or_does_not_fit_is_named_with_its_path(field, message):
    with pytest.raises(ConfigError) as error:
        values = load_configuration(QUICKSTART, [field])
        values.pop("name")
        from_dict(RunConfig, values)
    text = str(error.value)
    assert message in text and "\n" not in text and "Error" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:\n", "mine.py, line 1: invalid syntax"),
        ("import no_such_module\n", "mine.py, line 1: No module named 'no_such_module'"),
        ("def get_config():\n    return confg\n", "mine.py, line 2: name 'confg' is not defined"),
        ("def get_config():\n    return {}['seed']\n", "mine.py, line 2: seed"),
        ("def get_config():\n    return 3\n", "mine.py: got int of get_config, expected a ConfigDict"),
        ("config = 3\n", "mine.py: .* no attribute 'get_config'"),
        ("def get_config():\n    raise ValueError('seed: got -1, expected 0')\n", "mine.py: seed: got -1, expected 0$"),
        ("def get_config():\n    return 3\n", None),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_place(tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    choice = str(tmp_path / "mine.py") if message else f"{tmp_path / 'mine.py'}:pi05"  # which takes no variant
    with pytest.raises(ConfigError, match=message or "mine.py: .*takes 0 positional arguments") as error:
        load_configuration(choice)
    assert "\n" not in str(error.value) and "Error" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config=configs/quickstart.py:tpc"], "--config=configs/quickstart.py:tpc: quickstart: got 'tpc', expected"),
        (["--config=configs/quickstart.py", "--config.ppo.gama=0.9"], "--config.ppo.gama: there is no field 'gama' in"),
        (["--config=configs/ipi_widowx.py:full,lora"], "variant: got full and lora, expected one of them"),
        (
            ["--config=configs/quickstart.py", "--wrokdir=x"],
            "Unknown command line flag 'wrokdir'. Did you mean: workdir",
        ),
        (["--config=configs/quickstart.py", "more"], "got arguments ['more'], expected flags only"),
        ([], "--config"),
    ],
)
def test_training_answers_with_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_train(arguments) == 2
    said = capsys.readouterr().err
    assert line in said and said.startswith("error: ") and said.count("\n") == 1
    assert "ValueError" not in said and "(python launch/train.py --help)" in said


@pytest.mark.parametrize("argument", ["--wrokdir=x", "--config=configs/nothing.py"])
def test_a_wrong_flag_is_said_before_anything_slow_is_imported(argument):
    given = ["--config=configs/quickstart.py", argument] if argument.startswith("--w") else [argument]
    command_line = [sys.executable, "-X", "importtime", "launch/train.py", *given]
    result = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "error: " in result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "stare_jax.logging" in imported and not {"jax", "flax", "orbax.checkpoint", "transformers"} & imported
