"""Bins: of actions, as OpenVLA tokenises them, and of states, as prompts show them.

A bin id counts upwards with the action: bin `b` of 256 holds the normalised values between edge `b` and edge `b + 1` of
`linspace(-1, 1, 256)`; bin 255 holds 1.0 alone and decodes like bin 254 (256 ids, 255 centres).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.types import Array

NUM_BINS = 256
ZERO_BIN = NUM_BINS // 2 - 1
"""the bin that holds 0, in its centre."""
NUM_STATE_BINS = 256

Greedy = Literal["mode", "mean"]
"""Decision at temperature 0: "mode", the centre of the most likely bin, as OpenVLA decides; "mean", the mean of the
centres under the distribution over bins, which is not rounded to a bin."""


def _edges(num_bins: int) -> np.ndarray:
    """Returns the bin edges rounded up to float32, so that comparing float32 values is exact in float64 too."""
    exact = np.linspace(-1.0, 1.0, num_bins)
    rounded = exact.astype(np.float32)
    return np.where(rounded < exact, np.nextafter(rounded, np.float32(2.0)), rounded)


def encode_bins(unit_action: Array, *, num_bins: int = NUM_BINS) -> jax.Array:
    """Returns the bin of each normalised action, `b = digitize(clip(n, -1, 1), linspace(-1, 1, num_bins)) - 1`.

    Args:
        unit_action: float32 `[...]`, clipped to [-1, 1].
        num_bins: number of ids, which is also the number of edges.

    Returns:
        int32 `[...]` in [0, num_bins).
    """
    clipped = jnp.clip(jnp.asarray(unit_action, jnp.float32), -1.0, 1.0)
    num_edges_below = jnp.sum(clipped[..., None] >= _edges(num_bins), axis=-1, dtype=jnp.int32)
    return num_edges_below - 1


def decode_bins(bins: Array, *, num_bins: int = NUM_BINS) -> jax.Array:
    """Returns the centre of each bin, `c_b = (edge_b + edge_{b+1}) / 2`; the last id shares the centre before it.

    Args:
        bins: int32 `[...]` in [0, num_bins).
        num_bins: number of ids.

    Returns:
        float32 `[...]` in (-1, 1): the normalised action.
    """
    return _centers(num_bins)[jnp.clip(bins, 0, num_bins - 1)]


def _centers(num_bins: int) -> jax.Array:
    """Returns the centres float32 `[num_bins]`, of which the last two are equal."""
    edges = np.linspace(-1.0, 1.0, num_bins)
    centers = (edges[:-1] + edges[1:]) / 2.0
    return jnp.asarray(np.append(centers, centers[-1]), jnp.float32)


def bin_coordinate(unit_action: Array, *, num_bins: int = NUM_BINS) -> jax.Array:
    """Returns normalised actions in units of bins, float32, for soft labels: the centre of bin b is at b."""
    clipped = jnp.clip(jnp.asarray(unit_action, jnp.float32), -1.0, 1.0)
    return (clipped + 1.0) * ((num_bins - 1) / 2.0) - 0.5


def scale_logits(logits: Array, temperature: Array | float) -> jax.Array:
    """Returns the float32 logits of the distribution at `temperature`; those at temperature 1 where it is 0.

    A greedy choice has no useful log-probability of its own, so it is scored under the unscaled distribution.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.asarray(logits, jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)


def sample_bins(key: jax.Array, logits: Array, temperature: Array | float) -> jax.Array:
    """Samples from softmax(logits / temperature) by the Gumbel-max trick; temperature 0 takes the arg max.

    Args:
        key: consumed.
        logits: `[..., num_bins]`, unscaled.
        temperature: scalar >= 0, may be traced.

    Returns:
        int32 `[...]` in [0, num_bins).
    """
    logits = jnp.asarray(logits, jnp.float32)
    noise = jnp.asarray(temperature, jnp.float32) * jax.random.gumbel(key, logits.shape, jnp.float32)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def mean_of_bins(logits: Array) -> jax.Array:
    """Returns the mean of the centres under softmax(logits), `m = sum_b p_b c_b`, float32 `[...]` in (-1, 1).

    Args:
        logits: `[..., num_bins]`, unscaled.
    """
    probs = jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    # Not a matrix product, whose inputs some devices round to bfloat16.
    return jnp.sum(probs * _centers(logits.shape[-1]), axis=-1)


def choose_bins(
    key: jax.Array, logits: Array, temperature: Array | float, *, greedy: Greedy
) -> tuple[jax.Array, jax.Array]:
    """Decides on actions: by sampling, or at temperature 0 as `greedy` says.

    Args:
        key: consumed.
        logits: `[..., num_bins]`, unscaled.
        temperature: scalar >= 0, may be traced.
        greedy: the decision at temperature 0.

    Returns:
        Bins int32 `[...]`, and the normalised action float32 `[...]`: their centres, or the mean itself, whose bin is
        the one that holds it.
    """
    num_bins = logits.shape[-1]
    bins = sample_bins(key, logits, temperature)
    unit_action = decode_bins(bins, num_bins=num_bins)
    if greedy == "mode":
        return bins, unit_action
    mean, is_greedy = mean_of_bins(logits), jnp.asarray(temperature) == 0
    bins = jnp.where(is_greedy, encode_bins(mean, num_bins=num_bins), bins)
    return bins, jnp.where(is_greedy, mean, unit_action)


def score_bins(
    logits: Array, bins: Array, temperature: Array | float, is_decided: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores the bins of whole actions in float32.

    Args:
        logits: `[..., A, num_bins]`, unscaled.
        bins: int32 `[..., A]` in [0, num_bins).
        temperature: scalar >= 0, may be traced; see `scale_logits`.
        is_decided: NumPy bool `[A]`, the dimensions that count; None for all.

    Returns:
        Log-probabilities `[..., T]` in nats of the T dimensions that count, and entropy `[...]` in nats, their mean.
    """
    chex.assert_equal_shape_prefix([logits, bins], bins.ndim)
    log_probs = jax.nn.log_softmax(scale_logits(logits, temperature), axis=-1)
    logp = jnp.take_along_axis(log_probs, bins[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    if is_decided is None:
        return logp, entropy.mean(axis=-1)
    return logp[..., np.flatnonzero(is_decided)], entropy.mean(axis=-1, where=is_decided)


def kl_of_bins(logits: Array, reference_logits: Array, temperature: Array | float) -> jax.Array:
    """Returns KL(policy ‖ reference) in nats, float32 `[...]`, of logits `[..., num_bins]` at a temperature."""
    chex.assert_equal_shape([logits, reference_logits])
    log_probs, reference = (
        jax.nn.log_softmax(scale_logits(x, temperature), axis=-1) for x in (logits, reference_logits)
    )
    return jnp.sum(jnp.exp(log_probs) * (log_probs - reference), axis=-1)


def bin_state(unit_state: np.ndarray) -> np.ndarray:
    """Returns the bins of normalised states, int32 in [-1, 255], as openpi has them: `floor((s + 1) · 128)`, clipped.

    States in [-1, 1] fall into 256 equally wide bins, 1 itself into the last; a state below -1 has bin -1.
    """
    bins = np.floor((np.asarray(unit_state) + 1.0) * (NUM_STATE_BINS / 2))
    return np.clip(bins, -1, NUM_STATE_BINS - 1).astype(np.int32)
