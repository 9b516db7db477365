"""Bins: of actions, as OpenVLA tokenises them, and of states, as prompts show them.

A bin id counts upwards with the action: bin `b` of 256 holds the normalised values between edge `b` and edge `b + 1` of
`linspace(-1, 1, 256)`; bin 255 holds 1.0 alone and decodes like bin 254 (256 ids, 255 centres).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.types import Array

NUM_BINS = 256
ZERO_BIN = NUM_BINS // 2 - 1
"""the bin that holds 0, in its centre."""
NUM_STATE_BINS = 256


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
    edges = np.linspace(-1.0, 1.0, num_bins)
    centers = jnp.asarray((edges[:-1] + edges[1:]) / 2.0, jnp.float32)
    return centers[jnp.clip(bins, 0, num_bins - 2)]


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


def score_bins(
    logits: Array, bins: Array, temperature: Array | float, is_decided: Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores the bins of whole actions in float32.

    Args:
        logits: `[..., A, num_bins]`, unscaled.
        bins: int32 `[..., A]` in [0, num_bins).
        temperature: scalar >= 0, may be traced; see `scale_logits`.
        is_decided: bool `[A]`, the dimensions that count; None for all.

    Returns:
        Log-probability `[...]` in nats, summed over the A dimensions, and entropy `[...]` in nats, their mean.
    """
    chex.assert_equal_shape_prefix([logits, bins], bins.ndim)
    log_probs = jax.nn.log_softmax(scale_logits(logits, temperature), axis=-1)
    logp = jnp.take_along_axis(log_probs, bins[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return logp.sum(axis=-1, where=is_decided), entropy.mean(axis=-1, where=is_decided)


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
