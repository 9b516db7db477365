"""From raw episodes to what the losses need: rewards, potentials and advantages for PPO, stage masks and costs for TPO.

Functions for one episode, from its first state on; callers `vmap` and `jit` once.
"""

from typing import NamedTuple

import jax.numpy as jnp

from stare_jax.losses.returns import gae
from stare_jax.stages.costs import stage_costs
from stare_jax.stages.potentials import potentials
from stare_jax.stages.rewards import success_rewards
from stare_jax.stages.separate import separate, stage_mask
from stare_jax.stages.shaping import shape_rewards
from stare_jax.stages.spec import TaskSpec
from stare_jax.types import Array, Signals


class Annotation(NamedTuple):
    """The targets of PPO for one episode of N actions and D decisions, padded; zeros where there is no action."""

    reward_t: Array
    """float32 `[N]` r_t, and likewise below."""
    shaped_reward_t: Array
    """r'_t (5), or r_t where there is no shaping."""
    advantage_d: Array
    """float32 `[D]` of each decision, 0 where there is none; and likewise below."""
    return_d: Array
    valid_t: Array
    """bool `[N]`: which actions exist."""
    valid_d: Array
    """bool `[D]`: which decisions exist."""
    stage_t: Array
    """int32 `[N + 1]` labels of the states."""
    completed: Array
    """bool `[K]`."""


class DecisionRewards(NamedTuple):
    """The rewards of D = ceil(N / C) decisions; each executes C of N actions, the last perhaps fewer."""

    reward: Array
    """float32 `[D]`, and likewise below: rewards of the actions, discounted to the first of them."""
    discount: Array
    """of all of them, 0 after a true termination and where there is no decision."""
    valid: Array
    """bool `[D]`."""


def annotate_episode(
    signals: Signals,
    valid: Array,
    value: Array,
    *,
    spec: TaskSpec,
    shaping: bool,
    gamma: float,
    gae_lambda: float,
    time_limit: str,
    terminal_potential: str,
    chunk: int = 1,
    chunk_discount: str = "step",
) -> Annotation:
    """Labels one episode, rewards its success, shapes the reward (5) and estimates advantages (2).

    Args:
        signals: leaves `[N + 1, ...]`.
        valid: bool `[N + 1]` which states exist, a prefix. An episode of fewer than N actions that did not succeed was
            cut short, and is bootstrapped from its last value.
        value: float32 `[D + 1]`, `types.Decisions.value`: of the states in which decisions were made, and of the state
            that the last one led to.
        spec: the task.
        shaping: whether GAE sees r' (STA-PPO) or r (PPO).
        gamma: discount factor.
        gae_lambda: of GAE.
        time_limit: at the horizon of N actions "bootstrap" from the value of the last state, or "terminate" with
            nothing after it.
        terminal_potential: see `stages.shaping.shape_rewards`.
        chunk: C, actions that one decision executes.
        chunk_discount: "step" discounts by gamma an action, "decision" by gamma a decision and not within it. Shaping
            follows, so that over a decision it is what it is discounted by times the potential at its end, less that
            at its beginning.
    """
    separation = separate(spec, signals, valid)
    valid_t = valid[1:]
    reward_t = success_rewards(signals.success, valid)
    gamma_t, discount_t = _discounts(valid_t, reward_t > 0, gamma, time_limit, chunk, chunk_discount)

    shaped_reward_t = reward_t
    if shaping:
        potential_t = potentials(spec, signals, separation)
        shaped_reward_t = shape_rewards(
            reward_t,
            potential_t[:-1],
            potential_t[1:],
            discount_t,
            gamma=gamma_t,
            terminal_potential=terminal_potential,
        )
    shaped_reward_t = jnp.where(valid_t, shaped_reward_t, 0.0)
    reward_d, discount_d, valid_d = sum_rewards(shaped_reward_t, discount_t, valid_t, chunk=chunk)
    is_last_decision = valid_d & ~jnp.append(valid_d[1:], False)
    value = jnp.where(jnp.append(True, valid_d), value, 0.0)
    advantage_d, return_d = gae(
        reward_d, discount_d, value[:-1], value[1:], gae_lambda=gae_lambda, truncated_t=is_last_decision
    )
    return Annotation(
        reward_t=reward_t,
        shaped_reward_t=shaped_reward_t,
        advantage_d=jnp.where(valid_d, advantage_d, 0.0),
        return_d=jnp.where(valid_d, return_d, 0.0),
        valid_t=valid_t,
        valid_d=valid_d,
        stage_t=separation.stage_t,
        completed=separation.completed,
    )


def _discounts(
    valid_t: Array, is_terminated: Array, gamma: float, time_limit: str, chunk: int, chunk_discount: str
) -> tuple[Array, Array]:
    """Returns the discount of each action, float32 `[N]`, and the same with 0 where nothing follows."""
    ends_t = is_terminated
    if time_limit == "terminate":
        ends_t = ends_t.at[-1].set(valid_t[-1])
    gamma_t = jnp.full(valid_t.shape, gamma, jnp.float32)
    if chunk_discount == "decision":
        is_last = valid_t & ~jnp.append(valid_t[1:], False)
        gamma_t = jnp.where(is_last | (jnp.arange(len(valid_t)) % chunk == chunk - 1), gamma_t, 1.0)
    return gamma_t, jnp.where(valid_t & ~ends_t, gamma_t, 0.0)


def sum_rewards(reward_t: Array, discount_t: Array, valid_t: Array, *, chunk: int) -> DecisionRewards:
    """Sums up the rewards of each decision's actions: `R = sum_i (prod_{j < i} d_j) r_i`, `d = prod_i d_i`.

    Args:
        reward_t: float32 `[N]` of the actions.
        discount_t: float32 `[N]`, 0 after a true termination.
        valid_t: bool `[N]`, a prefix: which actions were executed.
        chunk: C, actions of a decision; the last one may have executed fewer.
    """
    num_decisions = -(-len(valid_t) // chunk)
    padding = (0, num_decisions * chunk - len(valid_t))

    def cut(x):
        return jnp.pad(x, padding).reshape(num_decisions, chunk)

    executed = cut(valid_t)
    discount = jnp.where(executed, cut(discount_t), 1.0)
    so_far = jnp.cumprod(jnp.pad(discount, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    is_valid = executed[:, 0]
    return DecisionRewards(
        reward=jnp.sum(jnp.where(executed, so_far[:, :-1] * cut(reward_t), 0.0), axis=1),
        discount=jnp.where(is_valid, so_far[:, -1], 0.0),
        valid=is_valid,
    )


class ActionStages(NamedTuple):
    """The stages of one episode as its actions see them."""

    mask: Array
    """bool `[K, N]`: the action was taken in a state of the stage, and exists."""
    cost: Array
    """float32 `[K]`."""
    completed: Array
    """bool `[K]`."""


def action_stages(signals: Signals, valid: Array, *, spec: TaskSpec) -> ActionStages:
    """Returns masks over actions and stage costs over states (3) of one episode.

    Args:
        signals: leaves `[N + 1, ...]`.
        valid: bool `[N + 1]`.
        spec: the task.
    """
    separation = separate(spec, signals, valid)
    return ActionStages(
        mask=stage_mask(separation, spec.num_stages, valid)[:, :-1] & valid[1:],
        cost=stage_costs(spec, signals, separation, valid),
        completed=separation.completed,
    )
