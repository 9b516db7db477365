"""A policy of our own out of a run: no optimiser, three lines of Python, and what --format refuses."""

import dataclasses
import json
import re
from pathlib import Path

import convert as command
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pi05_files
import pytest
from openvla_files import random_normal
from pi05_files import bits

from stare_jax.config import to_dict
from stare_jax.envs import EnvConfig, toy
from stare_jax.models import LoRAConfig, MLPConfig, make_policy, merge_adapters, openvla_state
from stare_jax.models.blank import leaf_shapes
from stare_jax.runs.config import RunConfig
from stare_jax.runs.load import identify_checkpoint, load_policy
from stare_jax.sharding.mesh import make_mesh
from stare_jax.stages import get_task
from stare_jax.state.checkpoint import Checkpoints, load_params, save_params
from stare_jax.state.storage import flatten, item_shapes, nest
from stare_jax.state.train_state import TrainState
from stare_jax.types import NormStats, Observation
from stare_jax.weights.load import initial_params

ROOT = Path(__file__).resolve().parents[2]
ENV = EnvConfig("PutCarrotOnPlateInScene-v1", image_size=28)
STATS = NormStats(
    *(np.full(7, x, np.float32) for x in (-1, 2)), np.arange(7) < 6, *(np.full(6, x, np.float32) for x in (-1, 1))
)


def convert(*arguments):
    return command.main([str(argument) for argument in arguments])


def save_run(directory, model, params, stats=STATS, step=40):
    """A run whose last phase saved a whole train state, optimiser included."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(RunConfig(ENV, model, get_task(ENV.env_id).params))))
    state = TrainState(jnp.int32(step), params, {}, optax.adam(0.1).init(params))
    with Checkpoints(directory / "ppo" / "checkpoints") as checkpoints:
        checkpoints.save(step, state, norm_stats=stats, model=json.loads(json.dumps(to_dict(model))), counters={})
    return directory / "ppo"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small policy over the state."""
    model = MLPConfig()
    policy = make_policy(model, toy.norm_stats())
    params = jax.jit(policy.init)(jax.random.key(1))
    return save_run(tmp_path_factory.mktemp("mlp") / "run", model, params, toy.norm_stats())


def test_three_lines_load_what_a_run_has_learned(run, tmp_path, monkeypatch):
    (tmp_path / "policies").mkdir()
    to = tmp_path / "policies" / "mine"
    to.mkdir()  # an empty folder is as good as none
    assert convert(f"--from={run}", "--format=orbax", f"--to={to}") == 0
    items = [set(item_shapes(folder / "checkpoints" / "40")) for folder in (run, to)]
    assert items == [{"params", "state"}, {"params"}]

    states = np.asarray(jax.random.uniform(jax.random.key(2), (3, 6)), np.float32)
    tokens = np.zeros((3, 0), np.int32)
    scope = {"observation": Observation({}, states, tokens, tokens.astype(bool))}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text("utf-8"), flags=re.S)
    (lines,) = [block for block in blocks if "load_policy" in block]
    assert len(lines.split("\n\n")[1].splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "weights.md", "exec"), scope)
    _, policy, params = load_policy(run)
    expected = jax.jit(policy.sample)(params, scope["observation"], jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, scope["decision"], expected)
    # The folder is all that it takes: wherever it lies, also within a run of something else.
    other = save_run(tmp_path / "other", openvla_state(), {"x": np.zeros(2, np.float32)}).parent
    moved = to.rename(other / "mine")
    loaded = load_policy(moved)
    assert loaded.config is None
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert identify_checkpoint(moved)[1].startswith("mine/40/")
    start = initial_params(moved, policy, MLPConfig(), make_mesh(), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, start, params)


def test_formats_that_do_not_fit_are_refused_in_one_line(run, tmp_path, capsys):
    def refuse(*arguments):
        assert convert(*arguments, f"--to={tmp_path / 'out'}") == 1 and not list(tmp_path.glob("out*"))
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    source = f"--from={run}"
    assert refuse(source, "--format=peft").endswith(f"got 'peft' for {run}, an MLP, expected one of orbax\n")
    assert "--base, --stats-name: got --format=orbax for" in refuse(source, "--stats-name=x", "--base=x")
    assert "merge: got True, expected False for parameters without adapters" in refuse(source, "--merge")
    assert "dtype: got 'bfloat16', expected none for an MLP" in refuse(source, "--dtype=bfloat16")
    theirs = pi05_files.write_openpi(tmp_path / "pi05", random_normal(pi05_files.tree_shapes(pi05_files.SMALL)))
    message = refuse(f"--from={theirs}", "--format=lerobot")
    assert "format: got 'lerobot' for a checkpoint of pi0.5 of others, expected orbax" in message


def test_a_phase_that_has_not_ended_is_asked_about(run, tmp_path, capsys):
    model = MLPConfig()
    params = load_policy(run).params
    phase = save_run(tmp_path / "run", model, params, toy.norm_stats(), step=7)
    (phase / "record.json").write_text("{}")
    assert convert(f"--from={phase}", f"--to={tmp_path / 'out'}") == 1
    got = f"{phase}: got a phase that has not ended, with a checkpoint of step 7"
    assert f"{got}, expected one that has, or --step=7" in capsys.readouterr().err
    assert convert(f"--from={phase}", f"--to={tmp_path / 'early'}", "--step=7") == 0
    (phase / "finished.json").write_text("{}")
    assert convert(f"--from={phase}", f"--to={tmp_path / 'out'}") == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for to in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        assert convert(f"--from={phase}", f"--to={to}") == 1
        assert f"{to}: got something there, expected a new name or an empty folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapted():
    """A pi0.5 with adapters, and parameters of it."""
    lora = LoRAConfig(rank=2, alpha=2.0, targets=(r"^PaliGemma/llm/layers/(attn|mlp)",))
    model = pi05_files.model_config(value_dims=(8,), lora=lora)
    rng = np.random.default_rng(0)
    params = {path: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype) for path, leaf in leaf_shapes(model).items()}
    return model, nest(params)


@pytest.mark.slow
def test_adapters_stay_apart_or_are_merged(adapted, tmp_path, capsys):
    model, params = adapted
    stats = STATS._replace(state_q01=np.zeros(0, np.float32), state_q99=np.zeros(0, np.float32))
    run = save_run(tmp_path / "run", model, params, stats)
    assert convert(f"--from={run}", "--format=peft", f"--to={tmp_path / 'x'}") == 1
    expected = "a pi0.5 with adapters, expected one of openpi, safetensors, lerobot, orbax"
    assert expected in capsys.readouterr().err
    for name, flags in (("apart", ()), ("merged", ("--merge",)), ("half", ("--dtype=bfloat16",))):
        assert convert(f"--from={run}", "--format=orbax", f"--to={tmp_path / name}", *flags) == 0
    apart, merged, half = (load_policy(tmp_path / name) for name in ("apart", "merged", "half"))
    assert bits(flatten(apart.params)) == bits(flatten(params))
    jax.tree.map(np.testing.assert_allclose, merged.params, merge_adapters(params, model.lora))
    types = {path: leaf.dtype.name for path, leaf in flatten(half.params).items()}
    assert types["PaliGemma/llm/embedder/input_embedding"] == "bfloat16"
    assert {types[path] for path in types if "lora_" in path or "value_head" in path} == {"float32"}
    # A policy goes on to openpi's layout as the run itself does.
    for source, to in ((run, "of_run"), (tmp_path / "apart", "of_policy")):
        assert convert(f"--from={source}", "--format=openpi", f"--to={tmp_path / to}", "--stats-name=mine") == 0
    of_run, of_policy = (pi05_files.read_openpi(tmp_path / name) for name in ("of_run", "of_policy"))
    assert bits(of_run) == bits(of_policy)
    published = set(pi05_files.tree_shapes(pi05_files.SMALL))
    assert {path for path in of_run if "lora_" not in path} == published
    assert (tmp_path / "of_policy" / "assets" / "mine" / "norm_stats.json").is_file()


def test_a_policy_takes_its_tokenizer_along(adapted, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    model = dataclasses.replace(adapted[0], tokenizer=str(tmp_path / "tokenizer"))
    (tmp_path / "run").mkdir()
    config = to_dict(RunConfig(ENV, model, get_task(ENV.env_id).params))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    stats = STATS._replace(state_q01=np.zeros(0, np.float32), state_q99=np.zeros(0, np.float32))
    checkpoints = tmp_path / "run" / "ppo" / "checkpoints"
    save_params(checkpoints, 3, adapted[1], model=json.loads(json.dumps(to_dict(model))), norm_stats=stats)
    assert convert(f"--from={checkpoints.parent}", "--format=orbax", f"--to={tmp_path / 'policy'}") == 0
    assert (tmp_path / "policy" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    fields = json.loads((tmp_path / "policy" / "config.json").read_text())["model"]
    assert fields["tokenizer"] == "tokenizer"
    again = load_params(tmp_path / "policy" / "checkpoints", adapted[1])
    assert bits(flatten(again)) == bits(flatten(adapted[1]))
