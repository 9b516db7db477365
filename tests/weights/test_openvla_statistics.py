"""Statistics of actions in checkpoint folders: BridgeData's numbers, several data sets, what files leave out."""

import json
import re

import numpy as np
import pytest
from openvla_files import read_norm_stats

from stare_jax.models.bins import decode_bins, encode_bins
from stare_jax.models.normalize import is_constant_action, normalize_action, unnormalize_action
from stare_jax.weights.statistics import to_openvla_table

BRIDGE = {
    "q01": [
        -0.02872725307941437,
        -0.04170349963009357,
        -0.026093858778476715,
        -0.08092105075716972,
        -0.09288699507713317,
        -0.20718276381492615,
        0.0,
    ],
    "q99": [
        0.028309678435325586,
        0.040855254605412394,
        0.040161586627364146,
        0.08192047759890528,
        0.07792850524187081,
        0.20382574498653397,
        1.0,
    ],
    "min": [-0.40075, -0.138748, -0.225539, -3.201079, -1.861811, -6.279076, 0.0],
    "max": [0.416912, 0.258648, 0.212182, 3.122202, 1.861811, 6.280478, 1.0],
    "mask": [True] * 6 + [False],
}


@pytest.fixture
def write(tmp_path):
    def write_statistics(config, side_file=None):
        wrap = lambda stats: {name: {"action": action} for name, action in stats.items()}  # noqa: E731
        (tmp_path / "config.json").write_text(json.dumps({"norm_stats": wrap(config)}))
        if side_file is not None:
            (tmp_path / "dataset_statistics.json").write_text(json.dumps(wrap(side_file)))
        return tmp_path

    return write_statistics


def test_tokens_are_millimetres_and_milliradians_of_bridge(write):
    stats = read_norm_stats(write({"bridge_orig": BRIDGE}))
    centers = np.repeat(np.asarray(decode_bins(np.arange(255)))[:, None], 7, axis=1)
    raw = unnormalize_action(centers, stats)
    # A bin is (q99 - q01) / 255 wide: 0.0570369 / 255 = 0.2237e-3 m, and so on; the gripper's is 2 / 255, as it is not
    # normalised.
    widths = [0.22367e-3, 0.32376e-3, 0.25983e-3, 0.63859e-3, 0.66986e-3, 1.61180e-3, 7.84314e-3]
    np.testing.assert_allclose(np.diff(raw, axis=0), np.tile(widths, (254, 1)), rtol=1e-3, atol=1e-7)
    half = np.array(widths) / 2
    np.testing.assert_allclose(raw[0, :6], np.array(BRIDGE["q01"][:6]) + half[:6], atol=1e-6)
    np.testing.assert_allclose(raw[-1, :6], np.array(BRIDGE["q99"][:6]) - half[:6], atol=1e-6)
    # 1 opens the gripper, 0 closes it: tokens 31744 and 31872.
    bins = np.asarray(encode_bins(normalize_action(np.float32([[0.0] * 6 + [1.0], [0.0] * 7]), stats)))
    assert (31999 - bins[:, 6]).tolist() == [31744, 31872]
    np.testing.assert_allclose(unnormalize_action(np.asarray(decode_bins(bins)), stats)[:, 6], [0.99608, 0], atol=1e-5)


def test_back_and_forth_is_half_a_bin_off_at_most(write):
    stats = read_norm_stats(write({"bridge_orig": BRIDGE}))
    action = np.random.default_rng(0).uniform(BRIDGE["q01"], BRIDGE["q99"], (500, 7)).astype(np.float32)
    again = unnormalize_action(np.asarray(decode_bins(encode_bins(normalize_action(action, stats)))), stats)
    half = 0.5 * (np.float32(BRIDGE["q99"]) - np.float32(BRIDGE["q01"])) / 255
    half[6] = 1 / 255
    assert (np.abs(again - action) <= half * 1.001 + 1e-7).all()


def test_the_data_set_is_named_where_there_are_several(write):
    folder = write({"bridge_orig": BRIDGE, "fractal": BRIDGE})
    for name in (None, "bridge"):
        message = f"unnorm_key: got {name!r}, expected one of ['bridge_orig', 'fractal'] for {folder}"
        with pytest.raises(ValueError, match=re.escape(message)):
            read_norm_stats(folder, unnorm_key=name)
    assert read_norm_stats(folder, unnorm_key="fractal").action_q99[0] == np.float32(BRIDGE["q99"][0])


def test_the_side_file_goes_over_the_configuration(write):
    own = BRIDGE | {"q99": [1.0] * 7}
    folder = write({"bridge_orig": BRIDGE, "fractal": BRIDGE}, side_file={"bridge_orig": own})
    np.testing.assert_array_equal(read_norm_stats(folder, unnorm_key="bridge_orig").action_q99[:6], 1.0)
    assert read_norm_stats(folder, unnorm_key="fractal").action_q99[0] == np.float32(BRIDGE["q99"][0])


def test_without_a_mask_everything_is_normalised_and_what_never_moves_is_constant(write):
    still = {"q01": [-1.0, 0.5, 0.0], "q99": [1.0, 0.5, 2.0]}
    stats = read_norm_stats(write({"mine": still}))
    assert stats.action_mask.tolist() == [True] * 3
    assert is_constant_action(stats).tolist() == [False, True, False]
    np.testing.assert_allclose(normalize_action(np.float32([0.0, 9.0, 1.0]), stats), 0.0)
    np.testing.assert_allclose(unnormalize_action(np.float32([0.0, 0.3, 1.0]), stats), [0.0, 0.5, 2.0])


def test_what_never_moves_is_the_same_whatever_token_the_original_generates(write):
    """The gripper of PushCube is always 1, and its token was never trained: OpenVLA's own formula has to give 1."""
    gripper = {name: [*BRIDGE[name][:6], 1.0] for name in ("q01", "q99", "min", "max")}
    stats = read_norm_stats(write({"mine": BRIDGE | gripper}))
    assert is_constant_action(stats).tolist() == [False] * 6 + [True] and not stats.action_mask[6]
    table = to_openvla_table(stats)["action"]
    centers = np.repeat(np.asarray(decode_bins(np.arange(255)))[:, None], 7, axis=1)
    low, high = np.array(table["q01"]), np.array(table["q99"])
    theirs = np.where(table["mask"], 0.5 * (centers + 1) * (high - low) + low, centers)
    np.testing.assert_allclose(theirs, unnormalize_action(centers, stats), atol=1e-6)
    assert (theirs[:, 6] == 1).all()
    # Read back, it is the same, and may be written under its name again; so is a gripper that moves.
    again = read_norm_stats(write({"mine": table}))
    assert to_openvla_table(again)["action"] == table
    assert is_constant_action(again).tolist() == [False] * 6 + [True]
    assert to_openvla_table(read_norm_stats(write({"mine": BRIDGE})))["action"]["mask"] == BRIDGE["mask"]


def test_a_gripper_of_equal_quantiles_moves_where_the_file_has_no_extremes(write):
    """It closes in fewer than one frame of a hundred; OpenVLA lets its tokens pass."""
    ends = {"q01": [*BRIDGE["q01"][:6], 1.0], "q99": BRIDGE["q99"], "mask": BRIDGE["mask"]}
    stats = read_norm_stats(write({"mine": ends}))
    assert not is_constant_action(stats).any()
    np.testing.assert_array_equal(unnormalize_action(np.float32([0.0] * 6 + [-0.5]), stats)[6], -0.5)
    assert is_constant_action(read_norm_stats(write({"mine": ends | {"min": ends["q01"], "max": ends["q99"]}})))[6]
