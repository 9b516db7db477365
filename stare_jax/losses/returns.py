"""Advantages and returns of one trajectory of N decisions, t = 0 .. N-1."""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from stare_jax.types import Array

GroupAdvantage = Literal["grpo", "rloo"]
"""Advantage of an episode over others with the same start, see `group_advantages`."""


class ChunkRewards(NamedTuple):
    """The rewards of D = ceil(N / C) decisions; each executes C of N actions, the last perhaps fewer."""

    reward_d: Array
    """float32 `[D]` rewards of the actions, discounted to the first of them."""
    discount_d: Array
    """float32 `[D]` product of the actions' discounts, 0 after a true termination and where there is no decision."""
    valid_d: Array
    """bool `[D]`: decisions that executed an action."""


def chunk_rewards(reward_t: Array, discount_t: Array, valid_t: Array, *, chunk: int) -> ChunkRewards:
    """Returns the rewards of decisions on several actions, R = sum_i (prod_{j < i} d_j) r_i, d = prod_i d_i.

    Args:
      reward_t: `[N]` of the actions.
      discount_t: `[N]`, 0 after a true termination.
      valid_t: bool `[N]`, a prefix: actions that were executed.
      chunk: C, actions of a decision; the last one may have executed fewer.
    """
    chex.assert_rank((reward_t, discount_t, valid_t), 1)
    chex.assert_equal_shape((reward_t, discount_t, valid_t))
    chex.assert_type((reward_t, discount_t, valid_t), (float, float, bool))
    num_decisions = -(-len(valid_t) // chunk)
    padding = (0, num_decisions * chunk - len(valid_t))

    def cut(x):
        return jnp.pad(x, padding).reshape(num_decisions, chunk)

    executed = cut(valid_t)
    discount = jnp.where(executed, cut(jnp.asarray(discount_t, jnp.float32)), 1.0)
    so_far = jnp.cumprod(jnp.pad(discount, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    reward = jnp.where(executed, so_far[:, :-1] * cut(jnp.asarray(reward_t, jnp.float32)), 0.0)
    is_valid = executed[:, 0]
    return ChunkRewards(jnp.sum(reward, axis=1), jnp.where(is_valid, so_far[:, -1], 0.0), is_valid)


def gae(
    reward_t: Array,
    discount_t: Array,
    value_t: Array,
    next_value_t: Array,
    *,
    gae_lambda: float,
    truncated_t: Array | None = None,
) -> tuple[Array, Array]:
    """Returns advantages and returns by generalised advantage estimation (2; Schulman et al., 2015, arXiv:1506.02438).

        delta_t = r_t + discount_t V(s_{t+1}) - V(s_t)
        A_t = delta_t + discount_t lambda (1 - truncated_t) A_{t+1}

    Args:
      reward_t: `[N]` r_t, or the shaped r'_t.
      discount_t: `[N]` 0 after a true termination and gamma elsewhere, a bootstrapped time limit included; gamma^m for
        a chunk of m executed steps.
      value_t: `[N]` V(s_t).
      next_value_t: `[N]` V of the state that a_t led to, also where the simulator has reset since.
      gae_lambda: lambda of the exponential mean, 0.95 in the paper.
      truncated_t: bool `[N]` last steps of episodes that did not terminate: the sum does not run on into the next
        episode. None for no such step.

    Returns:
      Advantages and returns A_t + V(s_t), float32 `[N]` each.
    """
    arrays = (reward_t, discount_t, value_t, next_value_t)
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, float)
    reward_t, discount_t, value_t, next_value_t = (jnp.asarray(array, jnp.float32) for array in arrays)
    decay_t = gae_lambda * discount_t
    if truncated_t is not None:
        chex.assert_shape(truncated_t, reward_t.shape, custom_message="truncated_t")
        chex.assert_type(truncated_t, bool, custom_message="truncated_t")
        decay_t = jnp.where(truncated_t, 0.0, decay_t)
    # The value beyond an episode's end must not matter, even if it is NaN.
    delta_t = reward_t + jnp.where(discount_t == 0, 0.0, discount_t * next_value_t) - value_t
    advantage_t = _discounted_sum(delta_t, decay_t, jnp.float32(0.0))
    return advantage_t, advantage_t + value_t


def group_advantages(return_g: Array, valid_g: Array, *, kind: GroupAdvantage) -> Array:
    """Returns the advantages of G episodes that begin alike, float32 `[G]`, 0 for one that is alone or not valid.

        "grpo"  A_g = (R_g - mean R) / std R                        (DeepSeekMath, arXiv:2402.03300)
        "rloo"  A_g = R_g - the mean of the others' R               (Ahmadian et al., arXiv:2402.14740)

    Args:
      return_g: `[G]` R, returns of whole episodes.
      valid_g: bool `[G]`: episodes that count.
      kind: "grpo", whose deviation is that of the valid episodes, or "rloo".

    Differs from the paper: it estimates advantages with a critic.
    """
    chex.assert_rank((return_g, valid_g), 1)
    if kind == "grpo":
        return whiten(return_g, valid_g)
    if kind != "rloo":
        raise ValueError(f"kind is {kind!r}, expected 'grpo' or 'rloo'.")
    chex.assert_equal_shape((return_g, valid_g))
    chex.assert_type((return_g, valid_g), (float, bool))
    return_g = jnp.where(valid_g, jnp.asarray(return_g, jnp.float32), 0.0)
    num_others = jnp.sum(valid_g) - 1
    advantage_g = return_g - (jnp.sum(return_g) - return_g) / jnp.maximum(num_others, 1)
    return jnp.where(valid_g & (num_others > 0), advantage_g, 0.0)


def discounted_returns(reward_t: Array, discount_t: Array, bootstrap_value: Array | float = 0.0) -> Array:
    """Returns G_t = r_t + discount_t G_{t+1}, float32 `[N]`.

    Args:
      reward_t: `[N]`.
      discount_t: `[N]`, 0 after a true termination.
      bootstrap_value: scalar G_N, the value of the state that the last action led to.
    """
    chex.assert_rank((reward_t, discount_t), 1)
    chex.assert_equal_shape((reward_t, discount_t))
    chex.assert_type((reward_t, discount_t), float)
    chex.assert_rank(bootstrap_value, 0)
    reward_t, discount_t = jnp.asarray(reward_t, jnp.float32), jnp.asarray(discount_t, jnp.float32)
    return _discounted_sum(reward_t, discount_t, jnp.float32(bootstrap_value))


def whiten(values: Array, valid: Array | None = None, *, epsilon: float = 1e-5) -> Array:
    """Returns (x - mean) / (std + epsilon) over the valid entries, float32 `[...]`, 0 elsewhere.

    Args:
      values: `[...]`, any shape; a whole batch of advantages, say.
      valid: bool `[...]` entries that count; None for all.
      epsilon: keeps the division finite where all entries are equal.
    """
    chex.assert_type(values, float)
    values = jnp.asarray(values, jnp.float32)
    if valid is None:
        valid = jnp.ones(values.shape, bool)
    chex.assert_shape(valid, values.shape, custom_message="valid")
    chex.assert_type(valid, bool, custom_message="valid")
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, values, 0.0)) / count
    centred = jnp.where(valid, values - mean, 0.0)
    return centred / (jnp.sqrt(jnp.sum(jnp.square(centred)) / count) + epsilon)


def _discounted_sum(value_t: Array, decay_t: Array, last: Array) -> Array:
    """Returns y_t = value_t + decay_t y_{t+1} with y_N = last, `[N]`."""

    def step(following, inputs):
        value, decay = inputs
        total = value + jnp.where(decay == 0, 0.0, decay * following)
        return total, total

    _, sum_t = jax.lax.scan(step, last, (value_t, decay_t), reverse=True)
    return sum_t
