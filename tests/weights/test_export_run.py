"""Runs that start from a converted checkpoint, and their export: where the rest comes from, and what is refused."""

import dataclasses
import json
from pathlib import Path

import convert as command
import jax
import numpy as np
import openvla_files
import pi05_files
import pytest
from openvla_files import ACTION, SMALL, load_openvla, read_folder, read_norm_stats

from stare_jax.config import ConfigError, to_dict
from stare_jax.envs import EnvConfig, toy
from stare_jax.models import LoRAConfig, MLPConfig, make_policy, openvla_state, openvla_tiny
from stare_jax.models.nn.lora import ATTENTION
from stare_jax.runs.config import RunConfig
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import get_task
from stare_jax.state.checkpoint import load_params, save_params
from stare_jax.types import NormStats
from stare_jax.weights import load as starting
from stare_jax.weights.openvla import read_config

ENV = EnvConfig("PutCarrotOnPlateInScene-v1", image_size=28)
LORA = LoRAConfig(rank=2, alpha=5.0, targets=ATTENTION)
STATS = NormStats(
    np.linspace(-2, -1, 7, dtype=np.float32),
    np.linspace(1, 2, 7, dtype=np.float32),
    np.arange(7) < 6,
    *(np.zeros(0, np.float32),) * 2,
)


def convert(*arguments):
    return command.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint in bfloat16, and the same converted."""
    folder = tmp_path_factory.mktemp("base")
    tensors = openvla_files.random_normal(openvla_files.checkpoint_shapes(SMALL), "bfloat16")
    openvla_files.write(folder / "hf", tensors, openvla_files.config_json(SMALL, "bfloat16"))
    assert convert(f"--from={folder / 'hf'}", f"--to={folder / 'ours'}") == 0
    return folder


def run_config(base, init_from, **model):
    config = read_config(base / "hf")
    types = {"dtype": "bfloat16", "param_dtype": "bfloat16" if "lora" in model else "float32"}
    execution = dataclasses.replace(config.execution, **types)
    model = dataclasses.replace(config, execution=execution, **model)
    return RunConfig(ENV, model, get_task(ENV.env_id).params, init_from=str(init_from))


def start_of(config):
    """Returns the parameters that the first phase of a run begins with."""
    return starting.initial_params(
        Path(config.init_from), make_policy(config.model, STATS), config.model, make_mesh(), jax.random.key(0)
    )


def save_run(directory, config, params, phase="ppo"):
    """A run that ended with these parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    save_params(directory / phase / "checkpoints", 40, params, model={}, norm_stats=STATS)
    return directory / phase


def moved(params, *, only=""):
    """Parameters that training has changed."""
    rng = np.random.default_rng(5)

    def move(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # In NumPy, because JAX compiles a sum for every shape.
        return np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype) if only in name else leaf

    return jax.device_put(jax.tree.map_with_path(move, params))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run that trained all weights in float32, from the converted checkpoint."""
    directory = tmp_path_factory.mktemp("tuned")
    config = run_config(base, base / "ours")
    start = start_of(config)
    return save_run(directory / "run", config, moved(start)), start


def test_a_run_chooses_what_no_file_of_the_converted_checkpoint_tells(base):
    model = run_config(base, base / "ours").model
    chosen = dataclasses.replace(model, camera="hand_camera", resize="lanczos3", center_crop=0.9)
    starting.check_source(base / "ours", chosen)
    with pytest.raises(ConfigError, match="is of another model:\n  model.critic: got 'shared', expected 'detached'$"):
        starting.check_source(base / "ours", dataclasses.replace(chosen, critic="detached"))


def test_a_run_starts_from_the_converted_checkpoint(base, tuned):
    """bfloat16 weights become the float32 ones that are trained; the checkpoint itself gives the same."""
    _, start = tuned
    expected = load_openvla(base / "hf", jax.random.key(0)).params
    jax.tree.map(np.testing.assert_array_equal, start, jax.tree.map(lambda leaf: leaf.astype(np.float32), expected))
    direct = start_of(run_config(base, base / "hf"))
    for part in expected.keys() - {"value_head"}:  # which is a new one
        jax.tree.map(np.testing.assert_array_equal, direct[part], start[part])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(start)} == {"float32"}


def test_a_policy_that_knows_no_adapters_starts_from_a_run(tmp_path):
    model, stats, mesh = MLPConfig(), toy.norm_stats(), make_mesh()
    policy = make_policy(model, stats)
    params = moved(policy.init(jax.random.key(0)))
    fields = json.loads(json.dumps(to_dict(model)))
    save_params(tmp_path / "sft" / "checkpoints", 3, params, model=fields, norm_stats=stats)
    start = starting.initial_params(tmp_path / "sft", policy, model, mesh, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, start, params)


def test_all_weights_of_a_run_come_out(base, tuned, tmp_path):
    run, _ = tuned
    assert convert(f"--from={run}", f"--to={tmp_path / 'hf'}") == 0
    got, before = read_folder(tmp_path / "hf"), read_folder(base / "hf")
    assert {name: spec[1] for name, spec in got.items()} == {name: spec[1] for name, spec in before.items()}
    assert {spec[0] for spec in got.values()} == {"float32"}
    # What was never run is what it was, in the wider type.
    pool = "vision_backbone.fused_featurizer.attn_pool.q.weight"
    wide = np.frombuffer(before[pool][2], jax.numpy.bfloat16).astype(np.float32)
    assert got[pool][2] == wide.tobytes()
    # Read back, it is the run's policy with the run's statistics; those of the base are still there.
    stats = read_norm_stats(tmp_path / "hf", unnorm_key=ENV.env_id)
    jax.tree.map(np.testing.assert_array_equal, stats, STATS)
    loaded = load_openvla(tmp_path / "hf", jax.random.key(1), unnorm_key=ENV.env_id)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load_params(run / "checkpoints", loaded.params))
    assert read_norm_stats(tmp_path / "hf", unnorm_key="robot").action_q99[1] == ACTION["action"]["q99"][1]
    description = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert set(description["norm_stats"]) == {"robot", ENV.env_id} and description["torch_dtype"] == "float32"
    assert set(json.loads((tmp_path / "hf" / "dataset_statistics.json").read_text())) == {ENV.env_id}


def test_the_base_is_found_through_runs_that_began_as_runs(base, tuned, tmp_path, capsys):
    run, start = tuned
    second = save_run(tmp_path / "second", run_config(base, run), start, phase="tpo")
    assert convert(f"--from={second}", f"--to={tmp_path / 'a'}", "--stats-name=mine", "--dtype=bfloat16") == 0
    assert "mine" in json.loads((tmp_path / "a" / "config.json").read_text())["norm_stats"]
    assert read_folder(tmp_path / "a") == read_folder(base / "hf")
    third = save_run(tmp_path / "third", run_config(base, tmp_path / "gone"), start)
    for arguments, message in (
        ([f"--from={third}"], f"began as {tmp_path / 'gone'}, which is not there; --base names"),
        ([f"--from={third}", f"--base={base / 'hf'}", "--stats-name=robot"], "stats_name: got 'robot', of which the"),
        (
            [f"--from={third}", f"--base={base / 'hf'}", "--stats-name=a/../../b"],
            "'a/../../b': got '..', expected letters",
        ),
    ):
        assert convert(*arguments, f"--to={tmp_path / 'b'}") == 1
        assert message in capsys.readouterr().err
    assert convert(f"--from={third}", f"--base={base / 'hf'}", f"--to={tmp_path / 'b'}", "--dtype=bfloat16") == 0
    assert read_folder(tmp_path / "b") == read_folder(base / "hf")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (openvla_tiny(), "ppo, an OpenVLA with model.stem = (32, 64), expected one of orbax"),
        (openvla_state(), "ppo, an OpenVLA with model.state_tokens = 4, expected one of orbax"),
        (None, "model.image_size: got 28, expected 56"),
    ],
)
def test_a_run_of_another_model_is_refused(base, tmp_path, capsys, model, message):
    model = model or dataclasses.replace(run_config(base, "").model, image_size=56)
    config = RunConfig(ENV, model, get_task(ENV.env_id).params)
    run = save_run(tmp_path / "run", config, {"llm": {"embed_tokens": jax.numpy.zeros(3)}})
    arguments = f"--from={run}", f"--to={tmp_path / 'hf'}", "--format=huggingface"
    if not config.model.stem and not config.model.state_tokens:
        assert convert(*arguments) == 1
        assert "began from random weights, expected an OpenVLA checkpoint; --base" in capsys.readouterr().err
    assert convert(*arguments, f"--base={base / 'ours'}") == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_base_of_another_kind_of_model_is_refused(tuned, tmp_path, capsys):
    run, _ = tuned
    theirs = pi05_files.write_openpi(
        tmp_path / "pi05", openvla_files.random_normal(pi05_files.tree_shapes(pi05_files.SMALL))
    )
    assert convert(f"--from={run}", f"--to={tmp_path / 'hf'}", f"--base={theirs}") == 1
    expected = f"error: got weights for Pi05Config in {theirs}, expected those of a OpenVLAConfig"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_adapters_of_a_run_come_out_alone_or_merged(base, tmp_path, capsys):
    config = run_config(base, base / "ours", lora=LORA)
    start = start_of(config)
    run = save_run(tmp_path / "run", config, moved(start, only="lora_"))
    assert convert(f"--from={run}", f"--to={tmp_path / 'peft'}") == 0
    description = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (description["r"], description["lora_alpha"], description["use_rslora"]) == (2, 5, False)
    layers = "language_model.model.layers."
    expected = {f"{layers}{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"}
    assert set(description["target_modules"]) == expected
    names = {f"base_model.model.{module}.lora_{x}.weight" for module in expected for x in "AB"}
    assert set(read_folder(tmp_path / "peft", "adapter_model.safetensors")) == names
    assert set(json.loads((tmp_path / "peft" / "dataset_statistics.json").read_text())) == {ENV.env_id}

    # The base and that adapter are the run's policy, statistics and value head included.
    to = tmp_path / "again"
    arguments = [f"--from={base / 'hf'}", f"--adapter={tmp_path / 'peft'}", f"--unnorm-key={ENV.env_id}", f"--to={to}"]
    assert convert(*arguments) == 0
    again, saved = (load_params(folder / "checkpoints", start) for folder in (to, run))
    jax.tree.map(np.testing.assert_array_equal, again, saved)
    # They are trained in float32 and come out like that, even if they came in rounded.
    to, file = tmp_path / "rounded", "adapter_model.safetensors"
    assert convert(f"--from={run}", f"--to={to}", "--dtype=bfloat16") == 0
    arguments = [f"--from={base / 'hf'}", f"--adapter={to}", f"--unnorm-key={ENV.env_id}", f"--to={tmp_path / 'next'}"]
    assert convert(*arguments) == 0
    later = save_run(tmp_path / "later", run_config(base, tmp_path / "next", lora=LORA), saved)
    assert convert(f"--from={later}", f"--to={tmp_path / 'float32'}") == 0
    assert read_folder(tmp_path / "float32", file) == read_folder(tmp_path / "peft", file)
    # A run that goes on from there has to count them alike.
    to = tmp_path / "next"
    starting.check_source(to, config.model)
    other = dataclasses.replace(config.model, lora=dataclasses.replace(LORA, alpha=1.0))
    with pytest.raises(ConfigError, match=r"is of another model:\n  model.lora.alpha: got 5.0, expected 1.0"):
        starting.check_source(to, other)

    # Weights beside the adapters that are not the base's would be lost.
    other = save_run(tmp_path / "other_base", config, moved(start, only="projector/fc1/kernel"))
    assert convert(f"--from={other}", f"--to={tmp_path / 'lost'}") == 1
    message = capsys.readouterr().err
    assert "got other weights than those beside the adapters in projector/fc1/kernel, expected" in message
    assert convert(f"--from={other}", f"--to={tmp_path / 'whole'}", "--merge") == 0
    changed = read_folder(tmp_path / "whole")["projector.fc1.weight"]
    kernel = load_params(other / "checkpoints", start)["projector"]["fc1"]["kernel"]
    assert changed == ("bfloat16", kernel.shape[::-1], np.asarray(kernel).T.tobytes())
