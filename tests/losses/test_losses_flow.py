"""Flow matching: closed forms, and the tables of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.losses import flow

RNG = np.random.default_rng(0)
X, V, W = RNG.normal(size=(3, 5, 4)).astype(np.float32)


def test_times_to_train_at_are_distributed_as_their_density():
    times = np.sort(np.asarray(flow.sample_times(jax.random.key(0), (20_000,))))
    assert times[0] >= 0.001 and times[-1] <= 1.0
    # Beta(1.5, 1): mean 0.6; 5 % below .05^(2/3) = .136, 95 % below .95^(2/3) = .966, the median .5^(2/3) = .630.
    np.testing.assert_allclose(np.quantile(times, [0.05, 0.5, 0.95]), [0.136, 0.630, 0.966], atol=0.01)
    grid = np.linspace(0.001, 1, 20_001)
    density = np.asarray(flow.time_density(grid))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=1e-3)


# Deviation of a step, σ √δ, in units of the noise level.
STEP_DEVIATIONS = {
    3: [1, 0.816, 0.408],
    4: [1, 0.866, 0.5, 0.289],
    5: [1, 0.894, 0.548, 0.365, 0.224],
    10: [1, 0.949, 0.632, 0.483, 0.387, 0.316, 0.258, 0.207, 0.158, 0.105],
}


@pytest.mark.parametrize("num_steps", STEP_DEVIATIONS)
def test_deviations_of_flow_sde(num_steps):
    index = jnp.arange(num_steps)
    std = flow.sde_transition(jnp.zeros(()), jnp.zeros(()), index, num_steps, noise_level=0.5).std
    np.testing.assert_allclose(std / 0.5, STEP_DEVIATIONS[num_steps], atol=1e-3)


def test_flow_sde_without_noise_is_eulers_step():
    for index in (0, 3):
        got = flow.sde_transition(X, V, jnp.int32(index), 4, noise_level=0.0)
        np.testing.assert_allclose(got.mean, flow.ode_transition(X, V, 4).mean, atol=1e-6)
        assert np.all(got.std == 0)
        assert np.all(flow.normal_logp(X, got) == 0)


def test_flow_sde_in_terms_of_both_ends():
    """mean = w_a (x - t v) + w_e (x + (1 - t) v), w_a = 1 - (t - δ), w_e = t - δ - σ² δ / (2 t)."""
    num_steps, index, level = 4, 1, 0.5
    t, delta = 0.75, 0.25
    sigma = level * np.sqrt(t / (1 - t))
    w_a, w_e = 1 - (t - delta), t - delta - sigma**2 * delta / (2 * t)
    by_ends = w_a * (X - t * V) + w_e * (X + (1 - t) * V)
    got = flow.sde_transition(X, V, jnp.int32(index), num_steps, noise_level=level)
    np.testing.assert_allclose(got.mean, by_ends, atol=1e-5)


def test_flow_sde_keeps_the_marginals_of_the_flow():
    """Actions normal with deviation s: x_t is normal with variance t² + (1 - t)² s², at any noise level."""
    num_steps, s, x = 400, 0.5, jax.random.normal(jax.random.key(0), (20_000,))

    def step(x, inputs):
        index, key = inputs
        t = flow.denoising_times(num_steps)[index]
        variance = t**2 + (1 - t) ** 2 * s**2
        velocity = (t - (1 - t) * s**2) / variance * x  # E[noise - action | x_t]
        mean, std = flow.sde_transition(x, velocity, index, num_steps, noise_level=0.7)
        return mean + std * jax.random.normal(key, x.shape), None

    keys = jax.random.split(jax.random.key(1), num_steps)
    x, _ = jax.jit(lambda x: jax.lax.scan(step, x, (jnp.arange(num_steps), keys)))(x)
    np.testing.assert_allclose(x.std(), s, rtol=0.03)


def test_log_density_and_entropy_of_a_transition():
    step = flow.Transition(jnp.asarray(X), jnp.float32(0.3))
    expected = -0.5 * ((V - X) / 0.3) ** 2 - np.log(0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(flow.normal_logp(V, step), expected, rtol=1e-5)
    draws = X[0, 0] + 0.3 * RNG.normal(size=100_000)
    one = flow.Transition(jnp.float32(X[0, 0]), jnp.float32(0.3))
    np.testing.assert_allclose(flow.normal_entropy(0.3), -flow.normal_logp(draws, one).mean(), atol=0.01)
    assert flow.normal_entropy(0.0) == 0


def test_kl_of_two_policies_that_share_their_noise():
    """δ (1 + a²/2)² / (2 a²) (1 - t) / t ‖Δv‖² for t < 1, ‖Δv‖² / (2 a² N²) at t = 1; 0 for the policy itself."""
    num_steps, level = 4, 0.5
    one, other = (functools.partial(flow.sde_transition, X, v, num_steps=num_steps, noise_level=level) for v in (V, W))
    square = np.sum((V - W) ** 2)
    for index, t in ((1, 0.75), (3, 0.25)):
        kl = flow.transition_kl(one(index=jnp.int32(index)), other(index=jnp.int32(index))).sum()
        factor = (1 + level**2 / 2) ** 2 / (2 * level**2) * (1 - t) / t / num_steps
        np.testing.assert_allclose(kl, factor * square, rtol=1e-5)
    first = flow.transition_kl(one(index=jnp.int32(0)), other(index=jnp.int32(0))).sum()
    np.testing.assert_allclose(first, square / (2 * level**2 * num_steps**2), rtol=1e-4)
    assert np.all(flow.transition_kl(one(index=jnp.int32(1)), one(index=jnp.int32(1))) == 0)


def test_weighted_errors_are_the_divergence_of_two_normal_distributions():
    """The integral of w(t) ‖v_m - v_0‖² of the best velocities of N(m, 1) and N(0, 1) is their KL divergence, m²/2."""
    mean, times = 1.2, jnp.linspace(0.0011, 0.9995, 20_001)
    variance = times**2 + (1 - times) ** 2
    # v(x, t) = E[noise - action | x_t]; the gap of the two does not depend on x.
    gap = mean * (-1 - (times - (1 - times)) / variance * (1 - times))
    weight = flow.elbo_weight(times, min_time=1e-3) * flow.time_density(times)
    np.testing.assert_allclose(weight, (1 - times) / times, rtol=2e-2)
    np.testing.assert_allclose(jnp.trapezoid((1 - times) / times * gap**2, times), mean**2 / 2, rtol=5e-3)


def test_errors_of_the_true_velocity_are_zero():
    noisy = flow.noisy_chunk(X, V, 0.25)
    np.testing.assert_allclose(noisy, 0.25 * V + 0.75 * X, atol=1e-6)
    assert np.all(flow.flow_matching_error(V - X, X, V) == 0)
    np.testing.assert_allclose(flow.flow_matching_error(V - X + 2, X, V), 4.0, rtol=1e-5)


def test_learned_deviations_stay_in_their_range():
    std = flow.learned_deviation(jnp.asarray([-50.0, 0.0, 50.0]))
    np.testing.assert_allclose(std, [0.08, np.sqrt(0.08 * 0.16), 0.16], rtol=1e-5)
