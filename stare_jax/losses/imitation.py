"""Imitation losses (appendix B.1). They are elementwise; the caller masks and averages."""

import chex
import jax
import jax.numpy as jnp

from stare_jax.types import Array


def token_cross_entropy(logits: Array, tokens: Array) -> Array:
    """Returns -log softmax(logits)[token], float32 nats `[...]`.

    Args:
      logits: `[..., V]`.
      tokens: int `[...]` in 0 .. V-1.
    """
    chex.assert_type((logits, tokens), (float, int))
    chex.assert_shape(tokens, logits.shape[:-1], custom_message="tokens")
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return -jnp.take_along_axis(log_probs, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]


def soft_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns -sum_v labels_v log softmax(logits)_v, float32 nats `[...]`.

    The least value is the entropy of the labels, not 0.

    Args:
      logits: `[..., V]`.
      labels: `[..., V]` probabilities, from `soft_labels` say.
    """
    chex.assert_type((logits, labels), float)
    chex.assert_equal_shape((logits, labels))
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    labels = jnp.asarray(labels, jnp.float32)
    # A logit masked out with -inf costs nothing where its label is 0.
    return -jnp.sum(jnp.where(labels == 0, 0.0, labels * log_probs), axis=-1)


def soft_labels(target: Array, *, num_bins: int, width: float) -> Array:
    """Returns labels that spread a continuous target over the bins near it, so that a near miss costs little.

    The label of bin j is the mass of a normal distribution around the target between j - 1/2 and j + 1/2. The outermost
    bins also get the tails beyond them, as an action beyond the range is clipped into it. So labels always sum to 1,
    and at the edges they move inwards less than renormalised labels would.

    Args:
      target: `[...]` in units of bins: the centre of bin j is j, j = 0 .. num_bins - 1.
      num_bins: number of bins.
      width: standard deviation of the normal in bins; 0 gives one-hot labels of the nearest bin.

    Returns:
      Probabilities, float32 `[..., num_bins]`.

    Raises:
      ValueError: the width is negative.

    Differs from the paper: its labels are one-hot, `width=0`.
    """
    chex.assert_type(target, float)
    if width < 0:
        raise ValueError(f"width is {width}, expected a number of bins >= 0.")
    target = jnp.asarray(target, jnp.float32)
    if width == 0:
        nearest = jnp.clip(jnp.floor(target + 0.5), 0, num_bins - 1).astype(jnp.int32)
        return jax.nn.one_hot(nearest, num_bins, dtype=jnp.float32)
    edges = jnp.arange(1, num_bins, dtype=jnp.float32) - 0.5
    below = jax.scipy.stats.norm.cdf((edges - target[..., None]) / width)
    padding = [(0, 0)] * target.ndim
    return jnp.diff(jnp.pad(jnp.pad(below, [*padding, (1, 0)]), [*padding, (0, 1)], constant_values=1.0))


def flow_matching_loss(velocity: Array, target_velocity: Array, weight: Array | None = None) -> Array:
    """Returns w mean_d (v_d - u_d)^2, float32 `[...]`, the error of the predicted flow.

    Args:
      velocity: `[..., D]` v_theta(x_t, t) at x_t = t noise + (1 - t) action.
      target_velocity: `[..., D]` u = noise - action.
      weight: bool or float `[...]` of each sample, step or action of a chunk; None for 1.
    """
    chex.assert_type((velocity, target_velocity), float)
    chex.assert_equal_shape((velocity, target_velocity))
    error = jnp.asarray(velocity, jnp.float32) - jnp.asarray(target_velocity, jnp.float32)
    if weight is None:
        return jnp.mean(jnp.square(error), axis=-1)
    chex.assert_shape(weight, error.shape[:-1], custom_message="weight")
    weight = jnp.asarray(weight, jnp.float32)
    # The contents of a padded row must not even overflow: an infinity times a zero weight is NaN.
    return weight * jnp.mean(jnp.square(jnp.where(weight[..., None] == 0, 0.0, error)), axis=-1)
