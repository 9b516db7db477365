"""Shaped rewards: by hand, the telescoping sum, and that the optimal policy stays what it was."""

import functools

import jax
import numpy as np
import pytest
from stage_signals import FAMILY_TASKS, random_signals, with_params

from stare_jax.stages import get_task, potentials, separate, shape_rewards, success_rewards


@functools.partial(jax.jit, static_argnums=0)
def jitted_potentials(spec, signals):
    return potentials(spec, signals, separate(spec, signals))


# gamma = .9 and Phi = .2, .5, .4, .8 along four states; the last action ends the episode.
POTENTIAL = np.float32([0.2, 0.5, 0.4, 0.8])


@pytest.mark.parametrize(
    "discount, terminal_potential, expected",
    [
        # .9*.5-.2, .9*.4-.5, and 1 + .9*.8-.4 at a time limit, 1 + 0-.4 at a termination unless it is kept.
        ([0.9, 0.9, 0.9], "zero", [0.25, -0.14, 1.32]),
        ([0.9, 0.9, 0.0], "zero", [0.25, -0.14, 0.6]),
        ([0.9, 0.9, 0.0], "keep", [0.25, -0.14, 1.32]),
    ],
)
def test_shape_rewards_by_hand(discount, terminal_potential, expected):
    shaped = shape_rewards(
        np.float32([0, 0, 1]),
        POTENTIAL[:-1],
        POTENTIAL[1:],
        np.float32(discount),
        gamma=0.9,
        terminal_potential=terminal_potential,
    )
    np.testing.assert_allclose(shaped, expected, atol=1e-6)


def test_shape_rewards_refuses():
    arrays = (np.zeros(3, np.float32),) * 4
    with pytest.raises(ValueError, match="terminal_potential is 'drop'"):
        shape_rewards(*arrays, gamma=0.9, terminal_potential="drop")
    with pytest.raises(AssertionError):
        shape_rewards(*arrays[:3], np.zeros(4, np.float32), gamma=0.9)


@pytest.mark.parametrize("env_id", FAMILY_TASKS)
@pytest.mark.parametrize("changes", [{}, {"progressive": False}, {"enabled": (True, False, True, False)}])
def test_shaping_telescopes(env_id, changes):
    # sum gamma^t r'_t = sum gamma^t r_t + gamma^N Phi_N - Phi_0, Phi_N = 0 after a termination.
    spec, gamma, num_actions = with_params(get_task(env_id), **changes), 0.97, 40
    signals = random_signals(1, num_actions + 1)
    phi = np.asarray(jitted_potentials(spec, signals))
    reward = np.random.default_rng(0).normal(size=num_actions).astype(np.float32)
    powers = gamma ** np.arange(num_actions)
    for last_discount, last_potential in ((gamma, phi[-1]), (0.0, 0.0)):
        discount = np.full(num_actions, gamma, np.float32)
        discount[-1] = last_discount
        shaped = np.asarray(shape_rewards(reward, phi[:-1], phi[1:], discount, gamma=gamma))
        expected = powers @ reward + gamma**num_actions * last_potential - phi[0]
        assert powers @ shaped == pytest.approx(expected, abs=1e-5)


def test_without_potential_sta_ppo_has_the_rewards_of_ppo():
    signals = random_signals(3, 21)
    spec = with_params(get_task("PushCube-v1"), enabled=(False,) * 4)
    phi = jitted_potentials(spec, signals)
    reward = success_rewards(signals.success)
    shaped = shape_rewards(reward, phi[:-1], phi[1:], np.full(20, 0.99, np.float32), gamma=0.99)
    np.testing.assert_array_equal(shaped, reward)


def optimal_values(transition, reward, discount):
    """Q* `[S, A]` of transition `[S, A, S]`, reward and discount of each (s, a, s')."""
    q = np.zeros(transition.shape[:2])
    for _ in range(2000):
        q = np.einsum("ijk,ijk->ij", transition, reward + discount * q.max(axis=1))
    return q


@pytest.mark.parametrize("seed", range(3))
def test_shaping_leaves_the_optimal_policy_as_it_is(seed):
    # A random MDP of 6 states and 3 actions; the last two states are terminal, and have potentials like the others.
    rng, gamma, num_states = np.random.default_rng(seed), 0.9, 6
    transition = rng.dirichlet(np.full(num_states, 0.3), (num_states, 3))
    reward = rng.normal(size=transition.shape).astype(np.float32)
    phi = rng.uniform(size=num_states).astype(np.float32)
    discount = np.broadcast_to(np.where(np.arange(num_states) < 4, gamma, 0.0), transition.shape).astype(np.float32)
    now, following = (np.broadcast_to(array, transition.shape) for array in (phi[:, None, None], phi))
    shaped = jax.vmap(lambda *arrays: shape_rewards(*arrays, gamma=gamma))(
        *(array.reshape(-1, num_states) for array in (reward, now, following, discount))
    )
    q = optimal_values(transition, reward, discount)
    q_shaped = optimal_values(transition, np.asarray(shaped).reshape(transition.shape), discount)
    np.testing.assert_allclose(q_shaped, q - phi[:, None], atol=1e-5)
    np.testing.assert_array_equal(q_shaped.argmax(axis=1), q.argmax(axis=1))


def test_keeping_the_terminal_potential_can_change_the_optimal_policy():
    # One decision: action 0 ends in success (r = .5, Phi = 0), action 1 in a failure that looks good (r = 0, Phi = 1).
    reward, phi, following, discount = np.float32([[0.5, 0.0], [0.3, 0.3], [0.0, 1.0], [0.0, 0.0]])
    zero = shape_rewards(reward, phi, following, discount, gamma=0.9)
    kept = shape_rewards(reward, phi, following, discount, gamma=0.9, terminal_potential="keep")
    assert np.argmax(zero) == 0 and np.argmax(kept) == 1
