"""norm_stats.json in and out: what openpi computes with it is what we do, and what is missing says so."""

import json

import numpy as np
import pi05_files
import pytest

from stare_jax.config import UserError
from stare_jax.documents import DocumentError
from stare_jax.models.normalize import to_quantiles
from stare_jax.types import NormStats
from stare_jax.weights.files import WeightsError
from stare_jax.weights.statistics import list_assets, read_asset, read_openpi_stats, to_openpi_stats


def write(tmp_path, stats):
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps(to_openpi_stats(stats)))
    return file


def test_quantiles_come_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    low = rng.normal(size=7).astype(np.float32)
    stats = NormStats(low, low + np.float32(0.1), np.ones(7, bool), low[:3], low[:3] + np.float32(1e-3))
    back = read_openpi_stats(write(tmp_path, stats))
    for name in NormStats._fields:
        np.testing.assert_array_equal(getattr(back, name), getattr(stats, name))
        assert getattr(back, name).dtype == getattr(stats, name).dtype


def test_what_openpi_requires_is_there(tmp_path):
    """98 % of a normal distribution lie between the quantiles 0.01 and 0.99, 2.3263 deviations from the mean."""
    stats = NormStats(np.full(2, -2.3263), np.full(2, 2.3263), np.array([True, False]), np.zeros(0), np.zeros(0))
    fields = json.loads(write(tmp_path, stats).read_text())["norm_stats"]
    assert fields.keys() == {"actions"}  # a state of no numbers has no statistics
    np.testing.assert_allclose(fields["actions"]["std"][0], 1, rtol=1e-6)
    assert fields["actions"]["mean"] == [0, 0]


def test_a_gripper_that_the_mask_leaves_out_is_scaled_as_the_policy_scales_it(tmp_path):
    """pi0.5 knows no mask: 0.079 of a gripper between 0 and 1 is -0.842 to the network, and comes back as 0.079."""
    stats = NormStats(np.zeros(2), np.ones(2), np.array([True, False]), np.zeros(0), np.zeros(0))
    fields = json.loads(write(tmp_path, stats).read_text())["norm_stats"]["actions"]
    assert (fields["q01"], fields["q99"]) == ([0, 0], [1, 1])
    raw = np.float32([[0.5, 0.079], [0.5, -0.642]])
    network = to_quantiles(raw, stats.action_q01, stats.action_q99)
    np.testing.assert_allclose(network[:, 1], [-0.842, -2.284], atol=1e-4)
    low, high = np.array(fields["q01"]), np.array(fields["q99"])
    np.testing.assert_allclose((network + 1.0) / 2.0 * (high - low + 1e-6) + low, raw, atol=1e-6)  # openpi's formula


def test_padded_statistics_are_cut_and_short_ones_refused(tmp_path):
    file = pi05_files.write_stats(tmp_path, dim=32, state_dim=32)
    assert len(read_openpi_stats(file).action_q01) == 32
    stats = read_openpi_stats(file, action_dim=7, state_dim=8)
    assert (len(stats.action_q01), len(stats.action_mask), len(stats.state_q99)) == (7, 7, 8)
    assert len(read_openpi_stats(pi05_files.write_stats(tmp_path, dim=40)).action_q01) == 32
    file = pi05_files.write_stats(tmp_path, dim=6, state_dim=4)
    with pytest.raises(
        DocumentError, match=r"norm_stats.json: norm_stats.actions.q01: got 6 numbers, expected 7 or more"
    ):
        read_openpi_stats(file, action_dim=7)
    with pytest.raises(DocumentError, match=r"norm_stats.state.q01: got 4 numbers, expected 8 or more"):
        read_openpi_stats(file, state_dim=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": None}, r"droid/norm_stats.json: norm_stats.actions.q01: got null, expected a list"),
        ({"q99": [2.0] * 8}, "norm_stats.actions.q99: got 8 items, expected 9, as in q01"),
        ({"q01": ["a"] * 9}, r"norm_stats.actions.q01\[0\]: got 'a', expected a finite number$"),
        ({"q01": [float("nan")] * 9}, r"norm_stats.actions.q01\[0\]: got nan, expected a finite number$"),
        ({"q01": [[0.0] * 9]}, r"norm_stats.actions.q01\[0\]: got .*, expected a finite number$"),
        ({"q01": 0.0}, "norm_stats.actions.q01: got 0.0, expected a list"),
        ({"q01": []}, "norm_stats.actions.q01: got 0 numbers, expected at least 1"),
        ({"q01": [0.5] * 8 + [9.0]}, "norm_stats.actions.q01: got 9 in dimension 8, expected at most q99, 3.14286"),
    ],
)
def test_quantiles_are_required(tmp_path, change, message):
    file = pi05_files.write_stats(tmp_path, **change)
    with pytest.raises(DocumentError, match=message) as error:
        read_openpi_stats(file)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "norm_stats.json"
    for content, message in (
        ("[]", "got a list, expected an object of named fields"),
        ("{}", "norm_stats: got nothing, expected an object"),
        ('{"norm_stats": {"state": {}}}', "norm_stats.actions: got nothing, expected an object"),
        (
            '{"norm_stats": {"actions": {"mean": []}}}',
            r"norm_stats.actions.q01: got nothing, expected a list.*\n.*actions.q99: got nothing",
        ),
        ("{", "got a file that is not JSON"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_openpi_stats(file)


def test_one_of_several_assets_is_named(tmp_path):
    assert read_asset([tmp_path]) == (None, None)
    pi05_files.write_stats(tmp_path, "physical-intelligence/libero", dim=3)
    assert read_asset([tmp_path])[0] == "physical-intelligence/libero"
    pi05_files.write_stats(tmp_path, "droid", dim=4)
    assert list_assets(tmp_path).keys() == {"droid", "physical-intelligence/libero"}
    with pytest.raises(WeightsError, match=r"unnorm_key: got None, expected one of \['droid', 'physical-"):
        read_asset([tmp_path])
    name, stats = read_asset([tmp_path], "droid")
    assert (name, len(stats.action_q01)) == ("droid", 4)


def test_assets_behind_a_link_are_found(tmp_path):
    pi05_files.write_stats(tmp_path / "shared", "droid", dim=4)
    (tmp_path / "weights" / "assets").mkdir(parents=True)
    (tmp_path / "weights" / "assets" / "mine").symlink_to(tmp_path / "shared" / "assets" / "droid")
    name, stats = read_asset([tmp_path / "weights"])
    assert (name, len(stats.action_q01)) == ("mine", 4)
