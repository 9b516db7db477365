"""Preference losses over pairs of trajectories: TPO (equation 1) and stage-aware TPO (equation 6, algorithm 1).

Both compare, step by step, Delta_t = log pi_theta'(a_t|s_t) - log pi_ref(a_t|s_t). The gradient of either loss with
respect to the log-probabilities, `jax.grad(loss, argnums=(0, 2))`, is the weight of every step; a large model can
compute these weights first and then accumulate weighted log-probability gradients over microbatches of steps.

Axes: B pairs, T actions (the two sides may be padded to different T), K stages.
"""

import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from stare_jax.types import Array

Margin = Literal["paper", "offset", "relabel"]
"""Part that the gap between the stage costs of a pair plays, see `sta_tpo_loss`."""

StageNorm = Literal["K", "valid"]
"""Divisor of a pair's sum over stages: their number K, or the number of those that count."""


def tpo_loss(
    chosen_logp: Array,
    chosen_ref_logp: Array,
    rejected_logp: Array,
    rejected_ref_logp: Array,
    chosen_valid: Array,
    rejected_valid: Array,
    *,
    beta: float,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of TPO, -mean log sigma(beta (q(tau+) - q(tau-))), q = mean_t Delta_t (1), and its metrics.

    Args:
      chosen_logp: `[B, T]` log pi_theta'(a_t|s_t) of the preferred trajectories.
      chosen_ref_logp: `[B, T]` the same under the reference policy; no gradient.
      rejected_logp: `[B, T]`.
      rejected_ref_logp: `[B, T]`.
      chosen_valid: bool `[B, T]` which actions exist.
      rejected_valid: bool `[B, T]`.
      beta: strength of the alignment.

    Returns:
      The scalar loss over the pairs of which both sides exist, and float32 scalar metrics `tpo/...`.
    """
    chosen_delta = _log_ratio(chosen_logp, chosen_ref_logp, chosen_valid)
    rejected_delta = _log_ratio(rejected_logp, rejected_ref_logp, rejected_valid)
    chosen_q, rejected_q = _mean(chosen_delta, chosen_valid), _mean(rejected_delta, rejected_valid)
    is_pair = _pairs(chosen_valid, rejected_valid)
    margin = beta * (chosen_q - rejected_q)
    loss = _mean(-jax.nn.log_sigmoid(margin), is_pair)
    metrics = {
        "tpo/loss": loss,
        "tpo/accuracy": _mean(margin > 0, is_pair),
        "tpo/margin": _mean(margin, is_pair),
        "tpo/chosen_logratio": _mean(chosen_q, is_pair),
        "tpo/rejected_logratio": _mean(rejected_q, is_pair),
    }
    return loss, _as_metrics(metrics)


def sta_tpo_loss(
    chosen_logp: Array,
    chosen_ref_logp: Array,
    rejected_logp: Array,
    rejected_ref_logp: Array,
    chosen_valid: Array,
    rejected_valid: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_cost: Array,
    rejected_cost: Array,
    chosen_completed: Array,
    rejected_completed: Array,
    *,
    beta: float,
    cost_coef: float,
    stage_norm: StageNorm = "K",
    margin: Margin = "paper",
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of stage-aware TPO (6, algorithm 1), and its metrics.

        q(tau_k) = mean over the actions of stage k of Delta_t,    q^(tau_k) = q(tau_k) - lambda l_k(tau)
        L = -1/|B| sum_pairs 1/K sum_k count log sigma(z_k),    z_k = beta (q^(tau_k+) - q^(tau_k-))

    A stage of a pair counts where the stage before it is completed and the stage itself has actions in both
    trajectories. Costs carry no gradient: with m_k = lambda (l_k(tau-) - l_k(tau+)), z_k = beta (q_k+ - q_k- + m_k).

    Args:
      chosen_logp, chosen_ref_logp, rejected_logp, rejected_ref_logp, chosen_valid, rejected_valid: as in `tpo_loss`.
      chosen_mask: bool `[B, K, T]` which actions are taken in a state of stage k.
      rejected_mask: bool `[B, K, T]`.
      chosen_cost: `[B, K]` l_k.
      rejected_cost: `[B, K]`.
      chosen_completed: bool `[B, K]`.
      rejected_completed: bool `[B, K]`.
      beta: strength of the alignment.
      cost_coef: lambda, weight of the costs.
      stage_norm: "K" divides a pair's sum by K, "valid" by the number of its stages that count.
      margin: "paper" adds m_k; "offset" subtracts it, so that a larger gap in cost asks for a larger likelihood ratio;
        "relabel" prefers the cheaper trajectory in each stage, z_k = beta (+-(q_k+ - q_k-) + |m_k|), + where
        l_k(tau+) <= l_k(tau-).

    Returns:
      The scalar loss over the pairs of which both sides exist, and float32 scalar metrics `tpo/...`; those of a stage
      that counts in no pair are 0.

    Raises:
      ValueError: `stage_norm` or `margin` has another value.

    Differs from the paper: `stage_norm="valid"`, and the margins other than "paper".
    """
    if stage_norm not in (allowed := typing.get_args(StageNorm)):
        raise ValueError(f"stage_norm is {stage_norm!r}, expected one of {allowed}.")
    if margin not in (allowed := typing.get_args(Margin)):
        raise ValueError(f"margin is {margin!r}, expected one of {allowed}.")
    chosen_delta = _log_ratio(chosen_logp, chosen_ref_logp, chosen_valid)
    rejected_delta = _log_ratio(rejected_logp, rejected_ref_logp, rejected_valid)
    chosen_steps = _stage_steps(chosen_mask, chosen_valid, chosen_cost, chosen_completed)
    rejected_steps = _stage_steps(rejected_mask, rejected_valid, rejected_cost, rejected_completed)
    chex.assert_equal_shape((chosen_cost, rejected_cost))
    gap = _mean(chosen_delta[:, None], chosen_steps) - _mean(rejected_delta[:, None], rejected_steps)
    cost_gap = jax.lax.stop_gradient(_float32(rejected_cost) - _float32(chosen_cost))
    cost_margin = cost_coef * cost_gap
    if margin == "relabel":  # By the costs themselves, so that without their weight the labels are the same.
        gap = jnp.where(cost_gap >= 0, gap, -gap)
    z = beta * (gap + _margin_term(cost_margin, margin))

    entered = _previous_completed(chosen_completed) & _previous_completed(rejected_completed)
    counts = entered & chosen_steps.any(axis=-1) & rejected_steps.any(axis=-1)
    stage_loss = jnp.where(counts, -jax.nn.log_sigmoid(z), 0.0)
    divisor = counts.shape[1] if stage_norm == "K" else jnp.maximum(jnp.sum(counts, axis=1), 1)
    is_pair = _pairs(chosen_valid, rejected_valid)
    loss = _mean(jnp.sum(stage_loss, axis=1) / divisor, is_pair)
    metrics = {
        "tpo/loss": loss,
        "tpo/chosen_logratio": _mean(_mean(chosen_delta, chosen_valid), is_pair),
        "tpo/rejected_logratio": _mean(_mean(rejected_delta, rejected_valid), is_pair),
        "tpo/num_valid_stages": _mean(jnp.sum(counts, axis=1), is_pair),
        **_stage_metrics(beta * gap, cost_margin, counts),
    }
    return loss, _as_metrics(metrics)


def _log_ratio(logp: Array, ref_logp: Array, valid: Array) -> Array:
    """Returns Delta_t `[B, T]`, 0 where there is no action."""
    chex.assert_rank((logp, ref_logp, valid), 2)
    chex.assert_equal_shape((logp, ref_logp, valid))
    chex.assert_type((logp, ref_logp, valid), (float, float, bool))
    return jnp.where(valid, _float32(logp) - jax.lax.stop_gradient(_float32(ref_logp)), 0.0)


def _stage_steps(mask: Array, valid: Array, cost: Array, completed: Array) -> Array:
    """Returns the existing actions of each stage, bool `[B, K, T]`."""
    num_pairs, num_steps = valid.shape
    chex.assert_shape(mask, (num_pairs, None, num_steps))
    chex.assert_shape((cost, completed), mask.shape[:2])
    chex.assert_type((mask, cost, completed), (bool, float, bool))
    return jnp.asarray(mask) & valid[:, None]


def _margin_term(cost_margin: Array, margin: Margin) -> Array:
    """Returns the number that is added to the likelihood gap towards the preferred trajectory, `[B, K]`."""
    if margin == "paper":
        return cost_margin
    return -cost_margin if margin == "offset" else jnp.abs(cost_margin)


def _previous_completed(completed: Array) -> Array:
    """Returns whether stage k-1 is completed, bool `[B, K]`; True for the first stage, which none precedes."""
    return jnp.pad(completed[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _pairs(chosen_valid: Array, rejected_valid: Array) -> Array:
    """Returns which pairs exist, bool `[B]`: a row that pads the batch, or lost a trajectory, has an empty side."""
    chex.assert_equal(chosen_valid.shape[0], rejected_valid.shape[0])
    return jnp.any(chosen_valid, axis=1) & jnp.any(rejected_valid, axis=1)


def _stage_metrics(margin: Array, cost_margin: Array, counts: Array) -> dict[str, Array]:
    metrics = {
        "tpo/accuracy": _mean((margin > 0).ravel(), counts.ravel()),
        "tpo/margin": _mean(margin.ravel(), counts.ravel()),
        "tpo/cost_margin": _mean(cost_margin.ravel(), counts.ravel()),
    }
    for k in range(counts.shape[1]):
        metrics[f"tpo/accuracy_stage_{k}"] = _mean(margin[:, k] > 0, counts[:, k])
        metrics[f"tpo/margin_stage_{k}"] = _mean(margin[:, k], counts[:, k])
        metrics[f"tpo/cost_margin_stage_{k}"] = _mean(cost_margin[:, k], counts[:, k])
        metrics[f"tpo/count_stage_{k}"] = jnp.sum(counts[:, k])
    return metrics


def _as_metrics(metrics: dict[str, Array]) -> dict[str, Array]:
    return {name: jax.lax.stop_gradient(_float32(value)) for name, value in metrics.items()}


def _mean(values: Array, mask: Array) -> Array:
    """Returns the mean of the masked values over the last axis, 0 where there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def _float32(values: Array) -> Array:
    return jnp.asarray(values, jnp.float32)
