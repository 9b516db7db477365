"""Normalisation by quantiles: numbers by hand, masks, constant dimensions, round trips, NumPy and JAX alike."""

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.models.normalize import (
    identity_stats,
    is_constant_action,
    normalize_action,
    normalize_state,
    scale_state,
    unnormalize_action,
)
from stare_jax.types import NormStats

STATS = NormStats(
    action_q01=np.float32([-2.0, 0.0, 3.0, -1.0]),
    action_q99=np.float32([2.0, 1.0, 3.0, 1.0]),
    action_mask=np.array([True, True, True, False]),
    state_q01=np.float32([0.0, 5.0]),
    state_q99=np.float32([10.0, 5.0]),
)


def test_numbers_by_hand():
    action = np.float32([[1.0, 0.25, 9.0, 7.0], [-9.0, 9.0, 3.0, -7.0]])
    expected = np.float32([[0.5, -0.5, 0.0, 7.0], [-1.0, 1.0, 0.0, -7.0]])
    np.testing.assert_allclose(normalize_action(action, STATS), expected)
    # Back: clipped values stay clipped, the constant dimension returns its constant.
    raw = np.float32([[1.0, 0.25, 3.0, 7.0], [-2.0, 1.0, 3.0, -7.0]])
    np.testing.assert_allclose(unnormalize_action(expected, STATS), raw)
    np.testing.assert_allclose(normalize_state(np.float32([[2.5, 1.0], [99.0, 5.0]]), STATS), [[-0.5, 0], [1, 0]])


def test_numpy_stays_numpy_and_jax_gives_the_same():
    action = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    host = normalize_action(action, STATS)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    device = jax.jit(lambda a: normalize_action(a, STATS))(action)
    np.testing.assert_allclose(device, host, atol=1e-6)
    np.testing.assert_allclose(unnormalize_action(jnp.asarray(host), STATS), unnormalize_action(host, STATS), atol=1e-6)


def test_identity_statistics():
    stats = identity_stats(3, 2)
    action = np.random.default_rng(0).uniform(-1, 1, (10, 3)).astype(np.float32)
    np.testing.assert_allclose(normalize_action(action, stats), action, atol=1e-6)
    np.testing.assert_allclose(unnormalize_action(action, stats), action, atol=1e-6)
    np.testing.assert_allclose(normalize_state(action[:, :2], stats), action[:, :2], atol=1e-6)
    assert normalize_state(np.zeros((4, 0), np.float32), identity_stats(3, 0)).shape == (4, 0)


def test_scaled_states_are_told_apart_beyond_the_data_and_small_ranges_are_not_blown_up():
    stats = identity_stats(1, 3)._replace(
        state_q01=np.float32([0.0, 0.2, 0.5]), state_q99=np.float32([2.0, 0.201, 0.5])
    )
    state = np.float32([[0.0, 0.2, 0.5], [2.0, 0.201, 0.505], [3.5, 0.2005, 9.0], [99.0, -9.0, 0.49]])
    expected = [[-1, -0.05, 0], [1, 0.05, 0.5], [2.5, 0, 3], [3, -3, -1]]
    np.testing.assert_allclose(scale_state(state, stats), expected, atol=1e-4)


def test_actions_that_do_not_move_are_constant_whether_normalised_or_not():
    stats = identity_stats(3, 0)._replace(
        action_q01=np.float32([0.0, 1.0, 1.0]),
        action_q99=np.float32([1.0, 1.0, 1.0]),
        action_mask=np.array([True, True, False]),
    )
    assert is_constant_action(stats).tolist() == [False, True, True]
    np.testing.assert_allclose(unnormalize_action(np.float32([0.0, 0.3, 0.3]), stats), [0.5, 1.0, 1.0], atol=1e-6)
