"""From raw episodes to what the losses need: rewards, potentials and advantages for PPO, stage masks and costs for TPO.

Functions for one episode, from its first state on; callers `vmap` and `jit` once.
"""

from typing import NamedTuple

import jax.numpy as jnp

from stare_jax.losses.returns import gae
from stare_jax.stages.costs import stage_costs
from stare_jax.stages.potentials import potentials
from stare_jax.stages.separate import separate, stage_mask
from stare_jax.stages.shaping import shape_rewards, success_rewards
from stare_jax.stages.spec import TaskSpec
from stare_jax.types import Array, Signals


class Annotation(NamedTuple):
    """What PPO learns from one episode of N actions, padded; zeros where there is no action."""

    reward_t: Array
    """float32 `[N]` r_t, and likewise below."""
    shaped_reward_t: Array
    """r'_t (5), or r_t where there is no shaping."""
    advantage_t: Array
    return_t: Array
    valid_t: Array
    """bool `[N]`: which actions exist."""
    stage_t: Array
    """int32 `[N + 1]` labels of the states."""
    completed: Array
    """bool `[K]`."""


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
) -> Annotation:
    """Labels one episode, rewards its success, shapes the reward (5) and estimates advantages (2).

    Args:
        signals: leaves `[N + 1, ...]`.
        valid: bool `[N + 1]` which states exist, a prefix. An episode of fewer than N actions that did not succeed was
            cut short, and is bootstrapped from its last value.
        value: float32 `[N + 1]` of the states.
        spec: the task.
        shaping: whether GAE sees r' (STA-PPO) or r (PPO).
        gamma: discount factor.
        gae_lambda: of GAE.
        time_limit: at the horizon of N actions "bootstrap" from the value of the last state, or "terminate" with
            nothing after it.
        terminal_potential: see `stages.shaping.shape_rewards`.
    """
    separation = separate(spec, signals, valid)
    valid_t = valid[1:]
    reward_t = success_rewards(signals.success, valid)
    is_last = valid_t & ~jnp.append(valid_t[1:], False)
    is_terminated = reward_t > 0
    ends_t = is_terminated
    if time_limit == "terminate":
        ends_t = ends_t.at[-1].set(valid_t[-1])
    discount_t = jnp.where(valid_t & ~ends_t, jnp.float32(gamma), 0.0)

    shaped_reward_t = reward_t
    if shaping:
        potential_t = potentials(spec, signals, separation)
        shaped_reward_t = shape_rewards(
            reward_t, potential_t[:-1], potential_t[1:], discount_t, gamma=gamma, terminal_potential=terminal_potential
        )
    shaped_reward_t = jnp.where(valid_t, shaped_reward_t, 0.0)
    value_t = jnp.where(valid, value, 0.0)
    advantage_t, return_t = gae(
        shaped_reward_t, discount_t, value_t[:-1], value_t[1:], gae_lambda=gae_lambda, truncated_t=is_last
    )
    return Annotation(
        reward_t=reward_t,
        shaped_reward_t=shaped_reward_t,
        advantage_t=jnp.where(valid_t, advantage_t, 0.0),
        return_t=jnp.where(valid_t, return_t, 0.0),
        valid_t=valid_t,
        stage_t=separation.stage_t,
        completed=separation.completed,
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
