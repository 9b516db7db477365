"""Ranges of actions and states: quantiles where they describe the data, and what lies beyond them."""

import numpy as np
import pytest

from stare_jax.data.norm_stats import compute_statistics, to_norm_stats
from stare_jax.data.ranges import MAX_SCALED, scale_actions, values_beyond
from stare_jax.data.reader import Dataset
from stare_jax.data.writer import DatasetWriter
from stare_jax.models.bins import bin_state
from stare_jax.models.normalize import identity_stats, is_constant_action, normalize_action, to_quantiles

FRAMES = 1000


def noisy(width, rare):
    """Values within a width, five of a thousand of which are others."""
    values = np.random.default_rng(0).uniform(0, width, FRAMES)
    values[::200] = rare
    return values


def stats_of(action, state=None):
    """Statistics of actions, the gripper's behind them."""
    action = np.stack([*action, np.arange(FRAMES) % 2], axis=1)
    state = np.zeros((FRAMES, 0)) if state is None else np.stack(state, axis=1)
    statistics = compute_statistics(action, state, num_trajectories=1)
    return action, to_norm_stats(statistics, action_dim=action.shape[1], state_dim=state.shape[1])


@pytest.mark.parametrize("width", [0.0, 1e-6, 5e-5])
def test_noise_with_rare_other_values_counts_as_never_moving_and_is_named(capsys, width):
    """By its quantiles alone 0.5 would be a million."""
    action, stats = stats_of([np.linspace(-1, 1, FRAMES), noisy(width, 0.5)])
    assert is_constant_action(stats).tolist() == [False, True, False]
    assert abs(stats.action_q01[1]) <= width and np.abs(normalize_action(action, stats)).max() <= 1
    said = capsys.readouterr().out
    assert "norm_stats.json: action 1: 98 % of its values lie within" in said
    assert "all within 0.5: taken for one that never moves" in said and "action 0" not in said


def test_small_movements_with_rare_large_ones_are_scaled_by_the_extremes_and_named(capsys):
    action, stats = stats_of([np.linspace(-1, 1, FRAMES), noisy(2e-3, 0.5)])
    assert not is_constant_action(stats).any()
    np.testing.assert_allclose(stats.action_q99[1] - stats.action_q01[1], 0.5, atol=1e-5)
    unit = to_quantiles(action.astype(np.float32), stats.action_q01, stats.action_q99)
    assert np.abs(unit).max() < 1.1
    assert (
        "action 1: 98 % of its values lie within 0.002, all within 0.5: scaled by minimum and"
        in capsys.readouterr().out
    )
    # Wider ones keep their quantiles, and then no value is farther than this.
    action, stats = stats_of([noisy(6e-3, 0.5)])
    unit = to_quantiles(action.astype(np.float32), stats.action_q01, stats.action_q99)
    assert 100 < np.abs(unit).max() < MAX_SCALED and capsys.readouterr().out == ""


def test_quantiles_of_bridge_are_taken_as_they_are():
    columns = {
        "q01": [-0.0287, -0.0417, -0.0261, -0.0809, -0.0929, -0.2072, 0.0],
        "q99": [0.0283, 0.0409, 0.0402, 0.0819, 0.0779, 0.2038, 1.0],
        "min": [-0.4007, -0.1387, -0.2255, -3.2011, -1.8618, -6.2791, 0.0],
        "max": [0.4169, 0.2586, 0.2122, 3.1221, 1.8618, 6.2805, 1.0],
    }
    columns = {name: np.float32(values) for name, values in columns.items()}
    low, high, lines = scale_actions(columns | {"mask": np.arange(7) < 6})
    np.testing.assert_array_equal([low, high], [columns["q01"], columns["q99"]])
    assert lines == []


def test_noise_of_a_state_stays_in_one_bin_of_the_prompt(capsys):
    noise = 0.3 + np.random.default_rng(0).normal(0, 1e-7, FRAMES)
    state = [np.linspace(0, 1, FRAMES), noise, np.full(FRAMES, 0.2)]
    _, stats = stats_of([np.linspace(-1, 1, FRAMES)], state)
    bins = bin_state(to_quantiles(np.stack(state, axis=1).astype(np.float32), stats.state_q01, stats.state_q99))
    assert np.unique(bins[:, 1]).tolist() == [128] and len(np.unique(bins[:, 0])) > 250
    np.testing.assert_allclose(stats.state_q99 - stats.state_q01, [0.98, 1e-3, 0], atol=1e-6)
    assert "state 1: 98 % of its values lie within" in capsys.readouterr().out


def test_what_lies_beyond_the_range_is_counted(tmp_path, make_trajectory):
    trajectory = make_trajectory(length=10, horizon=10)
    trajectory.action[:] = 0.0
    trajectory.action[:4, 0], trajectory.action[:3, 1], trajectory.action[5:, -1] = 0.7, 0.2, -0.5
    trajectory.observation.state[:] = 0.0
    trajectory.observation.state[:2, 0] = 9.0
    with DatasetWriter(tmp_path, env_id="X") as writer:
        writer.append(trajectory, instruction="push", seed=0, source="expert")
    size, state_dim = trajectory.action.shape[1], trajectory.observation.state.shape[1]
    stats = identity_stats(size, state_dim)
    low, high = stats.action_q01.copy(), stats.action_q99.copy()
    low[:2], high[:2], low[-1] = [-0.5, 0.0], [0.5, 0.0], 0.0  # the second never moves, the gripper is 0 to 1
    stats = stats._replace(action_q01=low, action_q99=high, action_mask=np.arange(size) < size - 1)
    masked = values_beyond(Dataset(tmp_path), stats, has_mask=True, has_state=True)
    expected = np.zeros(size)
    expected[:2] = 0.4, 0.3
    np.testing.assert_allclose(masked.action, expected)  # -0.5 of the gripper passes the mask
    np.testing.assert_allclose(masked.state, 0.2 * (np.arange(state_dim) == 0))
    flow = values_beyond(Dataset(tmp_path), stats, has_mask=False, has_state=False)
    expected[-1] = 0.5
    np.testing.assert_allclose(flow.action, expected)
    np.testing.assert_allclose(flow.farthest[[0, 1, -1]], [1.4, 0, 2], atol=1e-4)
