"""Flow matching: a window of actions is the end of a flow from noise; for imitation, sampling and log-probabilities.

    x_t = t · noise + (1 - t) · action,   velocity = dx/dt = noise - action,   t from 1 (noise) to 0 (action)

The functions take one window `[H, A]` at one time; callers `vmap`. The stochastic chains are those of pi_RL
(arXiv:2510.25889).
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from stare_jax.types import Array

TIME_ALPHA, MIN_TIME = 1.5, 0.001
"""Distribution of the times that are trained: `MIN_TIME + (1 - MIN_TIME) · Beta(TIME_ALPHA, 1)`, denser near noise."""


class Transition(NamedTuple):
    """A normal distribution of the next point of a chain, each number on its own; deviation 0 is an ordinary step."""

    mean: Array
    """float32 `[H, A]`."""
    std: Array
    """float32, of a shape that broadcasts to the mean's."""


def sample_times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws times to train at, float32 in [0.001, 1]."""
    # Beta(a, 1) is the a-th root of a uniform number.
    uniform = jax.random.uniform(key, shape, jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
    return MIN_TIME + (1 - MIN_TIME) * uniform ** (1 / TIME_ALPHA)


def time_density(time: Array) -> jax.Array:
    """Returns the density of `sample_times` at `time`."""
    unit = (jnp.asarray(time, jnp.float32) - MIN_TIME) / (1 - MIN_TIME)
    return TIME_ALPHA * jnp.maximum(unit, 0.0) ** (TIME_ALPHA - 1) / (1 - MIN_TIME)


def noisy_chunk(action: Array, noise: Array, time: Array) -> jax.Array:
    """Returns x_t float32 `[H, A]`."""
    chex.assert_equal_shape([action, noise])
    return time * noise + (1 - time) * action


def flow_matching_error(velocity: Array, action: Array, noise: Array) -> jax.Array:
    """Returns the squared error of a velocity, `(v - (noise - action))²`, float32 `[H, A]`."""
    chex.assert_equal_shape([velocity, action, noise])
    return jnp.square(jnp.asarray(velocity, jnp.float32) - (noise - action))


def elbo_weight(time: Array, *, min_time: float = 0.05) -> jax.Array:
    """Returns `w(t) / p(t)`, the weight with which errors at sampled times estimate a bound of the negative
    log-likelihood.

    `w(t) = (1 - t) / t` belongs to the error of the velocity, p is `time_density`.

    Args:
        time: any shape.
        min_time: smaller times count as this one, since the weight has a pole at 0.
    """
    clipped = jnp.maximum(jnp.asarray(time, jnp.float32), min_time)
    return (1 - clipped) / clipped / time_density(clipped)


def denoising_times(num_steps: int) -> jax.Array:
    """Returns t_0 .. t_N = 1, 1 - 1/N, .., 0, float32 `[N + 1]`."""
    return jnp.linspace(1.0, 0.0, num_steps + 1, dtype=jnp.float32)


def sde_deviation(index: Array, num_steps: int, *, noise_level: float) -> jax.Array:
    """Returns σ of step `index` of Flow-SDE, `a √(t / (1 - t))`. At t = 1 the denominator uses the time of the next
    step, so σ is `a √N` there."""
    times = denoising_times(num_steps)
    time = times[index]
    return noise_level * jnp.sqrt(time / (1 - jnp.where(index == 0, times[1], time)))


def ode_transition(x: Array, velocity: Array, num_steps: int) -> Transition:
    """Returns Euler's step, `x - v / N`."""
    return Transition(x - velocity / num_steps, jnp.float32(0.0))


def sde_transition(x: Array, velocity: Array, index: Array, num_steps: int, *, noise_level: float) -> Transition:
    """Returns a step of Flow-SDE, which has the marginals of the flow at any noise level:

        mean = x - δ v - σ² δ / (2 t) (x + (1 - t) v),   std = σ √δ,   δ = 1 / N

    Args:
        x: float32 `[H, A]` x_i.
        velocity: float32 `[H, A]` at x_i and its time.
        index: i in [0, N).
        num_steps: N.
        noise_level: a.
    """
    time, delta = denoising_times(num_steps)[index], 1 / num_steps
    sigma = sde_deviation(index, num_steps, noise_level=noise_level)
    drift = sigma**2 * delta / (2 * time) * (x + (1 - time) * velocity)
    return Transition(x - delta * velocity - drift, sigma * math.sqrt(delta))


def normal_logp(x: Array, transition: Transition) -> jax.Array:
    """Returns the log-density of each number of `x`, float32 `[H, A]`; 0 where the deviation is 0."""
    std = jnp.asarray(transition.std, jnp.float32)
    is_random = std > 0
    safe = jnp.where(is_random, std, 1.0)
    logp = -0.5 * jnp.square((x - transition.mean) / safe) - jnp.log(safe) - 0.5 * math.log(2 * math.pi)
    return jnp.where(is_random, logp, 0.0)


def normal_entropy(std: Array) -> jax.Array:
    """Returns ½ ln(2 π e s²) of each deviation; 0 where it is 0."""
    std = jnp.asarray(std, jnp.float32)
    return jnp.where(std > 0, 0.5 * math.log(2 * math.pi * math.e) + jnp.log(jnp.where(std > 0, std, 1.0)), 0.0)


def transition_kl(transition: Transition, reference: Transition) -> jax.Array:
    """Returns KL(transition ‖ reference) of each number, float32 `[H, A]`; 0 where neither is random."""
    std, ref_std = jnp.asarray(transition.std, jnp.float32), jnp.asarray(reference.std, jnp.float32)
    is_random = std > 0
    safe, ref_safe = jnp.where(is_random, std, 1.0), jnp.where(is_random, ref_std, 1.0)
    square = (jnp.square(safe) + jnp.square(transition.mean - reference.mean)) / (2 * jnp.square(ref_safe))
    return jnp.where(is_random, jnp.log(ref_safe / safe) + square - 0.5, 0.0)


def learned_deviation(raw: Array, *, low: float = 0.08, high: float = 0.16) -> jax.Array:
    """Returns the deviation of Flow-Noise in [low, high]: tanh of the head's output, linear in the log-variance."""
    low, high = 2 * math.log(low), 2 * math.log(high)
    log_variance = low + (high - low) * 0.5 * (jnp.tanh(jnp.asarray(raw, jnp.float32)) + 1)
    return jnp.exp(0.5 * log_variance)
