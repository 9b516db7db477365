"""Advantages and returns: by hand, against rlax, and where episodes end."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.losses import discounted_returns, gae, group_advantages, whiten

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Its own dependencies are deprecated; only tests use it.
    import rlax


def arrays(*rows):
    return tuple(np.float32(row) for row in rows)


# Discount .5, lambda .5, so the sum decays by .25 per step. Values 1, 2, 3 and 4 after the last action.
REWARD, VALUE, NEXT_VALUE = arrays([1, 0, 2], [1, 2, 3], [2, 3, 4])


@pytest.mark.parametrize(
    "discount, truncated, expected",
    [
        # delta = 1+1-1, 0+1.5-2, 2+2-3 = 1, -.5, 1; A_2 = 1, A_1 = -.5+.25, A_0 = 1+.25 (-.25)
        ([0.5, 0.5, 0.5], None, [0.9375, -0.25, 1.0]),
        # The second action ends the episode: delta_1 = 0+0-2, and nothing of A_2 passes it.
        ([0.5, 0.0, 0.5], None, [0.5, -2.0, 1.0]),
        # It runs out of time instead: the value of where it led counts, A_2 does not.
        ([0.5, 0.5, 0.5], [False, True, False], [0.875, -0.5, 1.0]),
        # A chunk of two executed steps: delta_1 = 0+.25*3-2 = -1.25 and A_1 = -1.25 + .125.
        ([0.5, 0.25, 0.5], None, [0.71875, -1.125, 1.0]),
    ],
)
def test_gae_by_hand(discount, truncated, expected):
    truncated = None if truncated is None else np.array(truncated)
    result = gae(REWARD, np.float32(discount), VALUE, NEXT_VALUE, gae_lambda=0.5, truncated_t=truncated)
    np.testing.assert_allclose(result[0], expected, atol=1e-6)
    np.testing.assert_allclose(result[1], np.float32(expected) + VALUE, atol=1e-6)


def random_rollout(seed, num):
    """Reward, discount with terminations, value, next value, truncation."""
    rng = np.random.default_rng(seed)
    reward, value, next_value = arrays(*rng.normal(size=(3, num)))
    discount = np.where(rng.random(num) < 0.2, 0.0, 0.97).astype(np.float32)
    return reward, discount, value, next_value, rng.random(num) < 0.2


def test_gae_against_rlax():
    reward, discount, value, next_value, _ = random_rollout(0, 30)
    next_value[:-1] = value[1:]  # rlax has one row of values.
    values = np.append(value, next_value[-1:])
    expected = rlax.truncated_generalized_advantage_estimation(
        jnp.array(reward), jnp.array(discount), 0.9, jnp.array(values)
    )
    np.testing.assert_allclose(gae(reward, discount, value, next_value, gae_lambda=0.9)[0], expected, atol=1e-5)


def test_gae_is_that_of_the_episodes_one_by_one():
    # The values of the states that actions led to are used, also where the simulator has reset since.
    reward, discount, value, next_value, truncated = random_rollout(1, 30)
    together, _ = gae(reward, discount, value, next_value, gae_lambda=0.9, truncated_t=truncated)
    ends = np.flatnonzero(truncated | (discount == 0)) + 1
    assert len(ends) > 3
    parts = [slice(start, end) for start, end in zip([0, *ends], [*ends, 30], strict=True) if end > start]
    single = [gae(reward[p], discount[p], value[p], next_value[p], gae_lambda=0.9)[0] for p in parts]
    np.testing.assert_allclose(together, np.concatenate(single), atol=1e-5)


def test_gae_limits():
    reward, discount, value, next_value, truncated = random_rollout(2, 30)
    td_error, _ = gae(reward, discount, value, next_value, gae_lambda=0.0)
    np.testing.assert_allclose(td_error, reward + discount * next_value - value, atol=1e-6)
    next_value[:-1] = value[1:]
    _, returns = gae(reward, discount, value, next_value, gae_lambda=1.0)
    np.testing.assert_allclose(returns, discounted_returns(reward, discount, next_value[-1]), atol=1e-5)


def test_gae_of_chunks_is_gae_of_steps():
    # Six steps, decided two at a time; with lambda = 1 the values inside a chunk cancel. The episode then goes on.
    gamma = 0.9
    reward, _, value, next_value, _ = random_rollout(3, 6)
    next_value[:-1] = value[1:]
    steps, _ = gae(reward, np.full(6, gamma, np.float32), value, next_value, gae_lambda=1.0)
    chunk_reward = reward[::2] + gamma * reward[1::2]
    discount = np.full(3, gamma**2, np.float32)
    chunks, _ = gae(chunk_reward, discount, value[::2], next_value[1::2], gae_lambda=1.0)
    np.testing.assert_allclose(chunks, steps[::2], atol=1e-5)


def test_gae_jit_vmap_and_padding():
    rows = [random_rollout(seed, 12) for seed in range(3)]

    def function(reward, discount, value, next_value, truncated):
        return gae(reward, discount, value, next_value, gae_lambda=0.95, truncated_t=truncated)

    batch = jax.jit(jax.vmap(function))(*(np.stack(column) for column in zip(*rows, strict=True)))
    for i, row in enumerate(rows):
        single = function(*row)
        np.testing.assert_allclose(single, [batch[0][i], batch[1][i]], atol=1e-6)
        assert single[0].dtype == single[1].dtype == jnp.float32
        # Behind an end, whatever follows is another matter.
        ended = [np.array(column) for column in row]
        ended[1][6], ended[4][6] = (0.0, False) if i % 2 else (0.97, True)
        changed = [column.copy() for column in ended]
        for column in changed[:4]:
            column[7:] = 1e6
        np.testing.assert_array_equal(function(*ended)[0][:7], function(*changed)[0][:7])


def test_discounted_returns_by_hand():
    # G_3 = 8, G_2 = 1 + 4, the second action terminates: G_1 = 2, G_0 = 4 + 1.
    returns = discounted_returns(*arrays([4, 2, 1], [0.5, 0.0, 0.5]), 8.0)
    np.testing.assert_allclose(returns, [5, 2, 5])


def test_whiten():
    values = np.float32([[1, 3, 100], [5, 7, np.nan]])
    valid = np.array([[True, True, False], [True, True, False]])
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    expected = np.array([[-3, -1, 0], [1, 3, 0]]) / 5**0.5
    np.testing.assert_allclose(whiten(values, valid, epsilon=0.0), expected, atol=1e-6)
    np.testing.assert_allclose(whiten(values[:, :2], epsilon=0.0), expected[:, :2], atol=1e-6)
    np.testing.assert_array_equal(whiten(np.full(4, 3.0, np.float32)), np.zeros(4))
    np.testing.assert_array_equal(whiten(values, np.zeros((2, 3), bool)), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("kind", "returns", "valid", "expected"),
    [
        ("grpo", [1, 0, 0, 1], [1, 1, 1, 1], [1, -1, -1, 1]),  # mean .5, deviation .5
        ("rloo", [1, 0, 0, 1], [1, 1, 1, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # less the mean of three others
        # An episode that was lost is no one's companion.
        ("grpo", [1, 0, 9, 0.5], [1, 1, 0, 1], [1.5**0.5, -(1.5**0.5), 0, 0]),  # deviation (1 / 6) ** .5
        ("rloo", [1, 0, 9, 0.5], [1, 1, 0, 1], [0.75, -0.75, 0, 0]),
        ("grpo", [1, 9], [1, 0], [0, 0]),
        ("rloo", [1, 9], [1, 0], [0, 0]),
        ("grpo", [0.3, 0.3], [1, 1], [0, 0]),
        ("rloo", [0.3, 0.3], [1, 1], [0, 0]),
    ],
)
def test_advantages_over_a_group_by_hand(kind, returns, valid, expected):
    result = group_advantages(np.float32(returns), np.array(valid, bool), kind=kind)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_another_advantage_over_a_group_is_refused():
    with pytest.raises(ValueError, match="kind is 'gae', expected 'grpo' or 'rloo'"):
        group_advantages(np.zeros(2, np.float32), np.ones(2, bool), kind="gae")


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        gae(REWARD, REWARD, VALUE, np.float32([1, 2]), gae_lambda=0.9)
    with pytest.raises(AssertionError, match="truncated_t"):
        gae(REWARD, REWARD, VALUE, VALUE, gae_lambda=0.9, truncated_t=REWARD)
