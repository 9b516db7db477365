"""Losses and returns, as pure functions of arrays."""

from stare_jax.losses.imitation import flow_matching_loss, soft_cross_entropy, soft_labels, token_cross_entropy
from stare_jax.losses.ppo import Ratio, clipped_surrogate, explained_variance, ppo_loss, reference_penalty, value_loss
from stare_jax.losses.preference import Margin, StageNorm, sta_tpo_loss, tpo_loss
from stare_jax.losses.returns import GroupAdvantage, chunk_rewards, discounted_returns, gae, group_advantages, whiten

__all__ = [
    "GroupAdvantage",
    "Margin",
    "Ratio",
    "StageNorm",
    "chunk_rewards",
    "clipped_surrogate",
    "discounted_returns",
    "explained_variance",
    "flow_matching_loss",
    "gae",
    "group_advantages",
    "ppo_loss",
    "reference_penalty",
    "soft_cross_entropy",
    "soft_labels",
    "sta_tpo_loss",
    "token_cross_entropy",
    "tpo_loss",
    "value_loss",
    "whiten",
]
