"""Statistics that a run begins with: those of the weights it starts from, or of its demonstrations."""

import dataclasses
import json

import numpy as np
import openvla_files
import pi05_files
import pytest
import toy_run
from toy_run import DressedToy, make_config

from stare_jax.config import ConfigError, to_dict
from stare_jax.data.reader import Dataset
from stare_jax.data.schema import Episode, Manifest, Shard, ShardFile, write_manifest
from stare_jax.envs import toy
from stare_jax.models import openvla_state
from stare_jax.runs.ipi import run_ipi
from stare_jax.runs.load import load_config, load_policy
from stare_jax.runs.start import (
    check_range,
    demonstration_statistics,
    read_statistics,
    shorten_planned_prompts,
    shorten_prompts,
    source_statistics,
    write_statistics,
)
from stare_jax.state.checkpoint import load_model, save_params
from stare_jax.weights.files import WeightsError
from stare_jax.weights.load import check_source
from stare_jax.weights.openvla import read_config

CONFIG = make_config()
PPO_ALONE = dataclasses.replace(CONFIG, phases=("ppo",))
LOW, HIGH = [-0.5] * 7, [0.25 * i for i in range(1, 8)]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A checkpoint of OpenVLA's with the statistics of two data sets."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    statistics = {
        name: {"action": {"q01": LOW, "q99": [scale * x for x in HIGH], "mask": [True] * 6 + [False]}}
        for name, scale in (("bridge_orig", 1.0), ("fractal", 2.0))
    }
    sizes = openvla_files.SMALL
    tensors = openvla_files.random_normal(openvla_files.checkpoint_shapes(sizes), "float32")
    openvla_files.write(folder, tensors, openvla_files.config_json(sizes, "float32", norm_stats=statistics))
    return folder


@pytest.fixture(scope="module")
def openpi(tmp_path_factory):
    """A checkpoint of openpi's with the statistics of one data set, longer than the robot's."""
    folder = tmp_path_factory.mktemp("source") / "openpi"
    pi05_files.write_openpi(folder, openvla_files.random_normal(pi05_files.tree_shapes(pi05_files.SMALL)))
    pi05_files.write_stats(folder, dim=9, state_dim=9)
    return folder


def test_interaction_from_hugging_face_takes_the_data_set_that_is_named(hugging_face):
    model = read_config(hugging_face)
    config = dataclasses.replace(PPO_ALONE, model=model, init_from=str(hugging_face), unnorm_key="fractal")
    stats = source_statistics(config)
    np.testing.assert_array_equal(stats.action_q99, np.float32([2 * x for x in HIGH]))
    assert stats.action_mask.tolist() == [True] * 6 + [False] and stats.state_q01.shape == (0,)
    # With imitation the demonstrations' hold, unless a data set is named.
    imitation = dataclasses.replace(config, phases=("sft",))
    np.testing.assert_array_equal(source_statistics(imitation).action_q99, stats.action_q99)
    assert source_statistics(dataclasses.replace(imitation, unnorm_key="")) is None


@pytest.mark.parametrize("key", ["", "bridge"])
def test_a_data_set_that_is_not_named_is_refused_with_the_choices(on_toy, hugging_face, tmp_path, key):
    config = dataclasses.replace(
        PPO_ALONE, model=read_config(hugging_face), init_from=str(hugging_face), unnorm_key=key
    )
    with pytest.raises(WeightsError, match=r"unnorm_key: got .*, expected one of \['bridge_orig', 'fractal'\]"):
        run_ipi(config, tmp_path / "run")
    assert DressedToy.num_started == 0 and not (tmp_path / "run").exists()


def test_interaction_from_openpi_takes_its_statistics(openpi):
    model = pi05_files.model_config(action_dim=7, state_dim=5)
    config = dataclasses.replace(PPO_ALONE, model=model, init_from=str(openpi))
    stats = source_statistics(config)
    np.testing.assert_array_equal(stats.action_q99, np.float32(np.arange(7) / 7 + 2))
    np.testing.assert_array_equal(stats.state_q99, np.float32(np.arange(5) / 7 + 2))
    with pytest.raises(WeightsError, match=r"unnorm_key: got 'libero', expected one of \['droid'\]"):
        source_statistics(dataclasses.replace(config, unnorm_key="libero"))
    (openpi / "assets").rename(openpi / "gone")
    with pytest.raises(WeightsError, match="unnorm_key: got None, expected statistics of a data set"):
        source_statistics(config)


def test_statistics_of_other_dimensions_are_refused(hugging_face):
    model = dataclasses.replace(read_config(hugging_face), action_dim=4)
    config = dataclasses.replace(PPO_ALONE, model=model, init_from=str(hugging_face), unnorm_key="fractal")
    with pytest.raises(ValueError, match="action_dim: got 4, expected 7"):
        source_statistics(config)


def test_a_run_from_another_takes_its_statistics_and_no_others(finished_run):
    config = dataclasses.replace(CONFIG, init_from=str(finished_run / "sft"))
    for a, b in zip(source_statistics(config), read_statistics(finished_run), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="unnorm_key: got 'x', expected '': .* has one data set's"):
        source_statistics(dataclasses.replace(config, unnorm_key="x"))
    assert source_statistics(CONFIG) is None


def test_statistics_are_the_same_after_writing(finished_run, tmp_path):
    stats = demonstration_statistics(CONFIG, finished_run / "data" / "demos")
    write_statistics(tmp_path, stats)
    for a, b in zip(read_statistics(tmp_path), stats, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert read_statistics(tmp_path / "nowhere") is None


def test_weights_of_another_model_are_refused_before_anything_is_collected(on_toy, hugging_face, tmp_path):
    model = dataclasses.replace(read_config(hugging_face), image_size=56)
    config = dataclasses.replace(CONFIG, model=model, init_from=str(hugging_face))
    with pytest.raises(ConfigError, match="model.image_size: got 28, expected 56"):
        run_ipi(config, tmp_path / "run")
    assert DressedToy.num_started == 0 and not (tmp_path / "run").exists()


def test_a_damaged_configuration_of_a_run_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"phases": [')
    with pytest.raises(ConfigError, match=r"config.json: got a file that is not JSON \(.*\), expected one that is$"):
        load_config(tmp_path)
    for field, value in (("stages", "x"), ("stages", []), ("env", None), ("env", 3), ("model", None)):
        (tmp_path / "config.json").write_text(json.dumps(to_dict(CONFIG) | {field: value}))
        with pytest.raises(
            ConfigError, match=rf"config.json: .*config.{field}: got .*, expected (the fields of|\w+Config)"
        ):
            load_config(tmp_path)


@pytest.mark.parametrize("env", [{"task": "nowhere/task.py"}, {"tasks": ["PushCube-v1", "nowhere/task.py"]}])
def test_a_task_whose_file_is_elsewhere_is_no_other_version(tmp_path, env):
    (tmp_path / "config.json").write_text(json.dumps({"env": env}))
    with pytest.raises(ConfigError, match="^task: got 'nowhere/task.py', expected a Python file; there is none in /"):
        load_config(tmp_path)


def with_range(stats, low, high):
    size = len(stats.action_q01)
    return stats._replace(action_q01=np.full(size, low, np.float32), action_q99=np.full(size, high, np.float32))


def test_demonstrations_beyond_the_statistics_of_the_weights_are_counted_and_refused(finished_run, capsys):
    demos, own = Dataset(finished_run / "data" / "demos"), read_statistics(finished_run)
    check_range(demos, CONFIG, own)
    assert "of the demonstrations' actions lie beyond the statistics of the weights" in capsys.readouterr().out
    other = with_range(own, 0.01, 0.02)
    with pytest.raises(
        ConfigError, match=r"config.max_clipped: got 0.1, but .* in dimension \d; expected statistics of"
    ):
        check_range(demos, CONFIG, other)
    check_range(demos, dataclasses.replace(CONFIG, max_clipped=1.0), other)
    # pi0.5 cuts nothing off, and would have to reach values of thousands where one value alone is within the range.
    few, first = with_range(own, -1.0, 1.0), demos.frame(0)["action"][0]
    few.action_q01[0], few.action_q99[0] = first - 1e-5, first + 1e-5
    flow = dataclasses.replace(CONFIG, model=pi05_files.model_config(action_dim=7), max_clipped=0.9999)
    with pytest.raises(ConfigError, match="config.init_from: got an action of .* in dimension 0, when it is scaled"):
        check_range(demos, flow, few)
    check_range(demos, dataclasses.replace(flow, max_clipped=1.0), few)


def test_a_run_under_another_robots_statistics_ends_before_it_learns(on_toy, finished_run, tmp_path):
    own = read_statistics(finished_run)
    save_params(
        tmp_path / "other" / "checkpoints",
        0,
        {"x": np.zeros(1, np.float32)},
        model=to_dict(CONFIG.model),
        norm_stats=with_range(own, 0.01, 0.02),
    )
    demos = str(finished_run / "data" / "demos")
    config = dataclasses.replace(CONFIG, phases=("sft",), init_from=str(tmp_path / "other"), demos_from=demos)
    with pytest.raises(ConfigError, match=r"config.max_clipped: got 0.1, but .* %"):
        run_ipi(config, tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists() and DressedToy.num_started == 0


# ---------------------------------------------------------------------------------------------------------- prompts


def test_a_run_pads_its_prompts_to_what_its_tasks_and_its_data_need(tmp_path):
    model = openvla_state(toy.STATE_DIM, prompt_length=200)
    config = make_config(model=model)
    assert shorten_prompts(config, model).prompt_length == shorten_planned_prompts(config).model.prompt_length == 16
    reworded = dataclasses.replace(config.env, perturbation="semantics/words")
    given = make_config(model=model, demos_from=str(tmp_path / "data"))
    assert shorten_planned_prompts(given) == given  # the data are not here
    for words, length in (("push", 16), ("push it " * 25, 64)):
        episodes = (Episode(0, words, "expert", 0.0, True, 5),)
        shard = Shard(ShardFile("frames", 6, 0, "0" * 64), ShardFile("episodes", 1, 0, "0" * 64))
        write_manifest(tmp_path / "data", Manifest("PushCube-v1", "", *({},) * 5, (shard,), episodes))
        assert shorten_prompts(given, model).prompt_length == length
    assert shorten_prompts(make_config(model=model, env=reworded), model).prompt_length == 16
    too_long = dataclasses.replace(model, prompt_length=12)
    with pytest.raises(ConfigError, match="prompt_length: got 12, expected at least 52 for 'push it push it"):
        shorten_prompts(given, too_long)
    download = dataclasses.replace(model, tokenizer="nobody/nothing")
    assert shorten_planned_prompts(make_config(model=download)).model == download


def test_a_run_reads_short_prompts_and_its_checkpoints_up_to_the_longest(finished_run, on_toy):
    """And whoever loads one pads to what is to be read then."""
    folder, words = finished_run / "sft", ["push the blue cube to the target"]
    assert load_model(folder / "checkpoints")["prompt_length"] == CONFIG.model.prompt_length == 64
    assert set(json.loads((finished_run.parent / "prompt_lengths").read_text())) == {16}
    toy_run.prompt_lengths.clear()
    for instructions in ([], words, ["push it " * 12], ["push it " * 200]):
        load_policy(folder, instructions=instructions)
    # The last does not fit at all, which the one who lets it be read is told.
    assert toy_run.prompt_lengths == [64, 16, 32, 64]
    check_source(folder, dataclasses.replace(CONFIG.model, prompt_length=200))
