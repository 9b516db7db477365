"""Proximal policy optimisation (equation 2). STA-PPO (algorithm 2) is the same loss on the GAE of shaped rewards."""

import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from stare_jax.types import Array

Ratio = Literal["decision", "token", "mean"]
"""The part of a decision that has a ratio of probabilities: "decision", all of it; "token", each term of its
log-probability, so that each is clipped on its own; "mean", all of it, its log-ratio divided by the number of terms."""

MAX_LOG_RATIO = 20.0
"""Bound of log-ratios, far outside the range that the clipped surrogate lets through."""


def ppo_loss(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    value: Array,
    old_value: Array,
    return_: Array,
    entropy: Array,
    valid: Array | None = None,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    value_coef: float = 1.0,
    value_clip_eps: float | None = None,
    huber_delta: float | None = None,
    entropy_coef: float = 0.0,
    ratio: Ratio = "decision",
    num_fixed_terms: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """Returns policy loss + value_coef value loss - entropy_coef entropy (2), and metrics `ppo/...`.

    All arrays have one shape `[...]`, a minibatch of decisions in any arrangement; means are over the valid ones.
    Only `logp`, `value` and `entropy` carry a gradient.

    Args:
      logp: `[..., T]`, the terms whose sum is log pi_theta'(a_t|s_t), of its tokens or of the steps of a flow; or
        `[...]`, the sum.
      old_logp: the same under the policy that acted.
      advantage: GAE, usually whitened.
      value: V(s_t) now.
      old_value: V(s_t) when the action was taken.
      return_: target of the value.
      entropy: of the policy in s_t, nats.
      valid: bool, which decisions exist; None for all.
      clip_eps: epsilon; the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high].
      clip_eps_high: None for `clip_eps`.
      dual_clip: see `clipped_surrogate`.
      value_coef: weight of the value loss.
      value_clip_eps: see `value_loss`.
      huber_delta: see `value_loss`.
      entropy_coef: weight of the entropy bonus.
      ratio: the part of a decision that has a ratio, see `Ratio`. The policy loss is the mean over decisions, in each
        the mean over its ratios.
      num_fixed_terms: terms that no parameter moves and `logp` leaves out; "mean" counts them.

    Returns:
      The scalar loss and a flat dict of float32 scalars. `ppo/approx_kl` is of whole decisions whatever the ratio is
      of; `ppo/clip_frac`, `ppo/ratio_...` and `ppo/log_ratio_square`, the mean square of its logarithm, are of the
      ratio.

    Raises:
      ValueError: `ratio` has another value.

    Differs from the paper: `ratio` other than "decision".
    """
    arrays = (advantage, value, old_value, return_, entropy)
    chex.assert_equal_shape(arrays)
    chex.assert_type((logp, old_logp, *arrays), float)
    valid = jnp.ones(jnp.shape(advantage), bool) if valid is None else valid
    chex.assert_shape(valid, jnp.shape(advantage), custom_message="valid")
    chex.assert_type(valid, bool, custom_message="valid")
    # The contents of a padded row must not even overflow: an infinity times a zero gradient is NaN.
    arrays = (jnp.where(valid, jnp.asarray(array, jnp.float32), 0.0) for array in arrays)
    advantage, value, old_value, return_, entropy = arrays
    advantage, old_value, return_ = jax.lax.stop_gradient((advantage, old_value, return_))

    log_ratio, whole_log_ratio = log_ratios(logp, old_logp, valid, ratio=ratio, num_fixed_terms=num_fixed_terms)
    ratios = jnp.exp(log_ratio)
    advantage, is_counted = (jnp.broadcast_to(x[..., None], ratios.shape) for x in (advantage, valid))
    clips = {"clip_eps": clip_eps, "clip_eps_high": clip_eps if clip_eps_high is None else clip_eps_high}
    policy = _mean(-clipped_surrogate(ratios, advantage, dual_clip=dual_clip, **clips), is_counted)
    critic = _mean(value_loss(value, old_value, return_, clip_eps=value_clip_eps, huber_delta=huber_delta), valid)
    mean_entropy = _mean(entropy, valid)
    loss = policy + value_coef * critic - entropy_coef * mean_entropy
    metrics = {
        "ppo/loss": loss,
        "ppo/policy_loss": policy,
        "ppo/value_loss": critic,
        "ppo/entropy": mean_entropy,
        "ppo/explained_variance": explained_variance(value, return_, valid),
        # The k3 estimator of KL(old || new): never negative, and of low variance.
        "ppo/approx_kl": _mean(jnp.expm1(whole_log_ratio) - whole_log_ratio, valid),
        **_ratio_metrics(log_ratio, ratios, is_counted, **clips),
    }
    return loss, {name: jax.lax.stop_gradient(jnp.asarray(value, jnp.float32)) for name, value in metrics.items()}


def log_ratios(
    logp: Array, old_logp: Array, valid: Array, *, ratio: Ratio, num_fixed_terms: int = 0
) -> tuple[Array, Array]:
    """Returns log-ratios within +-`MAX_LOG_RATIO`: `[..., T]` of each term or `[..., 1]`, and `[...]` of all of them.

    Args:
      logp, old_logp: `[..., T]` or `[...]`, see `ppo_loss`; the second carries no gradient.
      valid: bool `[...]`; elsewhere the log-ratio is 0.
      ratio: see `Ratio`.
      num_fixed_terms: see `ppo_loss`.

    Raises:
      ValueError: `ratio` has another value.
    """
    if ratio not in (allowed := typing.get_args(Ratio)):
        raise ValueError(f"ratio is {ratio!r}, expected one of {allowed}.")
    chex.assert_equal_shape((logp, old_logp))
    if jnp.ndim(logp) == jnp.ndim(valid):
        logp, old_logp = logp[..., None], old_logp[..., None]
    chex.assert_shape(logp, (*jnp.shape(valid), None))
    logp, old_logp = (jnp.where(valid[..., None], jnp.asarray(x, jnp.float32), 0.0) for x in (logp, old_logp))
    old_logp = jax.lax.stop_gradient(old_logp)
    # The exponential must not overflow: clipped or not, an infinite ratio has a gradient that is not a number.
    bounds = -MAX_LOG_RATIO, MAX_LOG_RATIO
    whole = jnp.clip(logp.sum(axis=-1) - old_logp.sum(axis=-1), *bounds)
    if ratio == "token":
        return jnp.clip(logp - old_logp, *bounds), whole
    num_terms = logp.shape[-1] + num_fixed_terms
    return (whole / num_terms if ratio == "mean" else whole)[..., None], whole


def reference_penalty(
    divergence: Array, valid: Array | None = None, *, kl_coef: float
) -> tuple[Array, dict[str, Array]]:
    """Returns kl_coef times the mean divergence from a reference policy, a term of a loss, and its metric.

    Args:
      divergence: `[...]` KL(policy || reference) of each decision, nats; carries the gradient.
      valid: bool, which decisions exist; None for all.
      kl_coef: weight.

    Differs from the paper: it has no reference policy in this phase.
    """
    chex.assert_type(divergence, float)
    valid = jnp.ones(jnp.shape(divergence), bool) if valid is None else valid
    chex.assert_shape(valid, jnp.shape(divergence), custom_message="valid")
    kl = _mean(jnp.where(valid, jnp.asarray(divergence, jnp.float32), 0.0), valid)
    return kl_coef * kl, {"ppo/reference_kl": jax.lax.stop_gradient(kl)}


def clipped_surrogate(
    ratio: Array,
    advantage: Array,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Array:
    """Returns min(p A, clip(p, 1 - eps, 1 + eps_high) A) (2), to be maximised, `[...]`.

    Args:
      ratio: `[...]` p = pi_theta'(a|s) / pi_theta(a|s).
      advantage: `[...]` A.
      clip_eps: eps.
      clip_eps_high: None for `clip_eps`; a larger value lets unlikely actions gain more (DAPO, arXiv:2503.14476).
      dual_clip: c > 1 bounds the surrogate of negative advantages from below by c A (arXiv:1912.09729); None for no
        bound.

    Raises:
      ValueError: `dual_clip` is not above 1.
    """
    chex.assert_equal_shape((ratio, advantage))
    chex.assert_type((ratio, advantage), float)
    clip_eps_high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps_high)
    surrogate = jnp.minimum(ratio * advantage, clipped_ratio * advantage)
    if dual_clip is None:
        return surrogate
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, expected a number above 1.")
    return jnp.where(advantage < 0, jnp.maximum(surrogate, dual_clip * advantage), surrogate)


def value_loss(
    value: Array,
    old_value: Array,
    return_: Array,
    *,
    clip_eps: float | None = None,
    huber_delta: float | None = None,
) -> Array:
    """Returns (R - V)^2 / 2 elementwise, `[...]`.

    Args:
      value: `[...]` V now.
      old_value: `[...]` V when the action was taken.
      return_: `[...]` R.
      clip_eps: the larger of this loss and the loss of V clipped to `old_value` +- clip_eps; None for no clipping.
      huber_delta: errors beyond it count linearly, delta (|R - V| - delta / 2); None for none.
    """
    chex.assert_equal_shape((value, old_value, return_))
    chex.assert_type((value, old_value, return_), float)
    loss = _huber(return_ - value, huber_delta)
    if clip_eps is None:
        return loss
    clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
    return jnp.maximum(loss, _huber(return_ - clipped, huber_delta))


def explained_variance(value: Array, return_: Array, valid: Array | None = None) -> Array:
    """Returns 1 - Var(R - V) / Var(R) over the valid entries: 1 is a perfect critic, 0 a constant one.

    Args:
      value: `[...]` V.
      return_: `[...]` R; 0 is returned where its variance is 0.
      valid: bool `[...]`; None for all.
    """
    chex.assert_equal_shape((value, return_))
    chex.assert_type((value, return_), float)
    valid = jnp.ones(jnp.shape(value), bool) if valid is None else valid
    chex.assert_shape(valid, value.shape, custom_message="valid")
    total = _variance(return_, valid)
    # The variance of equal returns consists of rounding errors, so 1 - Var / Var could be any number.
    is_constant = total <= 1e-12 * _mean(jnp.square(return_), valid)
    return jnp.where(is_constant, 0.0, 1.0 - _variance(return_ - value, valid) / jnp.where(is_constant, 1.0, total))


def _ratio_metrics(
    log_ratio: Array, ratio: Array, valid: Array, *, clip_eps: float, clip_eps_high: float
) -> dict[str, Array]:
    mean_ratio = _mean(ratio, valid)
    is_clipped = (ratio < 1.0 - clip_eps) | (ratio > 1.0 + clip_eps_high)
    return {
        "ppo/log_ratio_square": _mean(jnp.square(log_ratio), valid),
        "ppo/clip_frac": _mean(is_clipped, valid),
        "ppo/ratio_mean": mean_ratio,
        # Padded rows take part as the mean, which is never the extreme.
        "ppo/ratio_min": jnp.min(jnp.where(valid, ratio, mean_ratio)),
        "ppo/ratio_max": jnp.max(jnp.where(valid, ratio, mean_ratio)),
    }


def _huber(error: Array, delta: float | None) -> Array:
    square = 0.5 * jnp.square(error)
    if delta is None:
        return square
    size = jnp.abs(error)
    return jnp.where(size <= delta, square, delta * (size - 0.5 * delta))


def _mean(values: Array, valid: Array) -> Array:
    """Returns the mean of the valid values, 0 where there are none."""
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def _variance(values: Array, valid: Array) -> Array:
    return _mean(jnp.square(values - _mean(values, valid)), valid)
