"""Statistics that a run begins with: those of the weights it starts from, or of its demonstrations."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from toy_run import DressedToy, make_config

from stare_jax.config import ConfigError
from stare_jax.models import openvla_tiny, pi05_tiny
from stare_jax.runs.ipi import run_ipi
from stare_jax.runs.start import demonstration_statistics, read_statistics, source_statistics, write_statistics
from stare_jax.weights.safetensors_folder import WeightsError

CONFIG = make_config()
PPO_ALONE = dataclasses.replace(CONFIG, phases=("ppo",))
LOW, HIGH = [-0.5] * 7, [0.25 * i for i in range(1, 8)]


@pytest.fixture
def hugging_face(tmp_path):
    """A checkpoint of OpenVLA's with the statistics of two data sets."""
    folder = tmp_path / "hf"
    folder.mkdir()
    statistics = {
        name: {"action": {"q01": LOW, "q99": [scale * x for x in HIGH], "mask": [True] * 6 + [False]}}
        for name, scale in (("bridge_orig", 1.0), ("fractal", 2.0))
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": statistics}))
    return folder


@pytest.fixture
def openpi(tmp_path):
    """A checkpoint of openpi's with the statistics of one data set, padded to its width."""
    file = tmp_path / "openpi" / "assets" / "droid" / "norm_stats.json"
    file.parent.mkdir(parents=True)
    numbers = {"q01": [-1.0] * 32, "q99": [float(i) for i in range(1, 33)]}
    file.write_text(json.dumps({"norm_stats": {"state": numbers, "actions": numbers}}))
    return tmp_path / "openpi"


def test_interaction_from_hugging_face_takes_the_data_set_that_is_named(hugging_face):
    model = openvla_tiny()
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
    config = dataclasses.replace(PPO_ALONE, model=openvla_tiny(), init_from=str(hugging_face), unnorm_key=key)
    with pytest.raises(WeightsError, match=r"unnorm_key: got .*, expected one of \['bridge_orig', 'fractal'\]"):
        run_ipi(config, tmp_path / "run")
    assert DressedToy.num_started == 0 and not (tmp_path / "run").exists()


def test_interaction_from_openpi_takes_its_statistics(openpi):
    config = dataclasses.replace(PPO_ALONE, model=pi05_tiny(6), init_from=str(openpi))
    stats = source_statistics(config)
    np.testing.assert_array_equal(stats.action_q99, np.arange(1, 8, dtype=np.float32))
    np.testing.assert_array_equal(stats.state_q99, np.arange(1, 7, dtype=np.float32))
    shutil.rmtree(openpi / "assets")
    with pytest.raises(ValueError, match="statistics"):
        source_statistics(config)


def test_statistics_of_other_dimensions_are_refused(hugging_face):
    model = dataclasses.replace(openvla_tiny(), action_dim=4)
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
