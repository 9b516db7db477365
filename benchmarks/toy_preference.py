"""Preference learning on the toys as one compiled program: pairs of a policy's own episodes, and losses on them.

Pairs are the best and the worst of the episodes from one start, in the order of `data.pairs`: success before failure,
then the number of completed stages. Starts whose episodes all end alike make no pair.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from toy_learning import Episodes, draw_seeds, make_policy, observation_of, play_policy

from stare_jax.envs.toys import Toy
from stare_jax.losses import Margin, StageNorm, sta_tpo_loss, tpo_loss
from stare_jax.models.policy import Policy
from stare_jax.stages import ActionStages, TaskSpec, action_stages
from stare_jax.state.optimizer import OptimizerConfig, make_optimizer
from stare_jax.types import Array, PyTree

EPISODES_PER_START = 4


class Arm(NamedTuple):
    """A loss on pairs."""

    loss: str
    """"tpo", "sta_tpo", or "imitation": minus the mean log-probability of the chosen actions."""
    margin: Margin = "paper"
    stage_norm: StageNorm = "K"


class Hyper(NamedTuple):
    """Settings that are tuned; scalars, which may be traced."""

    learning_rate: Array | float
    beta: Array | float
    cost_coef: Array | float
    num_epochs: Array | int


class Side(NamedTuple):
    """The chosen or the rejected episodes, leaves `[B, ...]`, with all that training does not change."""

    state: Array
    """`[B, N, S]`."""
    trace: dict[str, Array]
    ref_logp: Array
    """`[B, N]`."""
    valid: Array
    """bool `[B, N]`; none where there is no pair."""
    stages: ActionStages


class Outcome(NamedTuple):
    """Result of a phase."""

    before: Array
    """share of successes before it."""
    success: Array
    """share of successes after it."""
    num_pairs: Array
    completed: Array
    """`[K]` share of episodes that complete each stage, after it."""


def make_pairs(episodes: Episodes, spec: TaskSpec) -> tuple[Side, Side]:
    """Returns the chosen and the rejected episodes, a row for each start.

    Args:
        episodes: leaves `[B * EPISODES_PER_START, ...]`, those of a start side by side; records are decisions.
        spec: the task's stages.
    """
    stages = jax.vmap(functools.partial(action_stages, spec=spec))(episodes.signals, episodes.valid)
    is_success = (episodes.signals.success & episodes.valid).any(axis=1)
    rank = (spec.num_stages + 1) * is_success + stages.completed.sum(axis=1)
    rank = rank.reshape(-1, EPISODES_PER_START)
    first = EPISODES_PER_START * jnp.arange(len(rank))
    best, worst = rank.argmax(axis=1), rank.argmin(axis=1)
    is_pair = rank.max(axis=1) > rank.min(axis=1)

    def side(rows):
        state, decision, valid = episodes.state[rows, :-1], episodes.record, episodes.valid[rows, 1:]
        trace = jax.tree.map(lambda x: x[rows], decision.trace)
        of_rows = jax.tree.map(lambda x: x[rows], stages)
        return Side(state, trace, decision.logp[rows].sum(axis=-1), valid & is_pair[:, None], of_rows)

    return side(first + best), side(first + worst)


def arm_loss(arm: Arm) -> Callable[..., Array]:
    """Returns (chosen log-probabilities `[B, N]`, rejected ones, chosen, rejected, hyper) -> loss."""

    def loss_fn(chosen_logp, rejected_logp, chosen, rejected, hyper):
        if arm.loss == "imitation":
            count = jnp.maximum(chosen.valid.sum(), 1)
            return -jnp.sum(jnp.where(chosen.valid, chosen_logp, 0.0)) / count
        scores = (chosen_logp, chosen.ref_logp, rejected_logp, rejected.ref_logp, chosen.valid, rejected.valid)
        if arm.loss == "tpo":
            return tpo_loss(*scores, beta=hyper.beta)[0]
        loss, _ = sta_tpo_loss(
            *scores,
            chosen.stages.mask,
            rejected.stages.mask,
            chosen.stages.cost,
            rejected.stages.cost,
            chosen.stages.completed,
            rejected.stages.completed,
            beta=hyper.beta,
            cost_coef=hyper.cost_coef,
            stage_norm=arm.stage_norm,
            margin=arm.margin,
        )
        return loss

    return loss_fn


def make_preference(
    toy: Toy, arms: Sequence[Arm], *, num_starts: int, batch_size: int, num_evaluated: int
) -> Callable[..., Outcome]:
    """Compiles a phase: (params `[R, ...]`, keys `[R]`, arm, hyper, max_step) -> `Outcome` with leaves `[R, ...]`.

    Args:
        toy: the task.
        arms: the program can run any of them; it takes the index.
        num_starts: starts of episodes that pairs are made of, a multiple of the batch size.
        batch_size: pairs of a step.
        num_evaluated: episodes that measure success before and after.
    """
    policy = make_policy(toy)
    losses = [arm_loss(arm) for arm in arms]

    def train(params, key, arm, hyper, max_step):
        seed_key, play_key, order_key, eval_key = jax.random.split(key, 4)
        seeds = jnp.repeat(draw_seeds(seed_key, num_starts), EPISODES_PER_START)
        episodes = play_policy(policy, params, toy, seeds, play_key, max_step=max_step)
        pairs = make_pairs(episodes, toy.spec)
        before, _ = _evaluate(policy, params, toy, eval_key, num_evaluated, max_step)

        def loss_fn(params, rows):
            chosen, rejected = jax.tree.map(lambda x: x[rows], pairs)
            logp = [_log_probs(policy, params, side) for side in (chosen, rejected)]
            return jax.lax.switch(arm, losses, *logp, chosen, rejected, hyper)

        trained = _fit(params, loss_fn, order_key, hyper, size=num_starts, batch_size=batch_size)
        success, completed = _evaluate(policy, trained, toy, eval_key, num_evaluated, max_step)
        return Outcome(before, success, pairs[0].valid.any(axis=1).sum(), completed)

    rows = Hyper(*(None if name == "num_epochs" else 0 for name in Hyper._fields))
    return jax.jit(jax.vmap(train, in_axes=(0, 0, None, rows, None)))


def _fit(params: PyTree, loss_fn: Callable, key: Array, hyper: Hyper, *, size: int, batch_size: int) -> PyTree:
    """Minimises loss_fn(params, rows) over epochs of shuffled rows."""
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.0, max_grad_norm=1.0), num_steps=None)

    def step(carry, rows):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, rows), opt_state, params)
        return (optax.apply_updates(params, optax.tree.scale(hyper.learning_rate, updates)), opt_state), None

    def epoch(i, carry):
        order = jax.random.permutation(jax.random.fold_in(key, i), size)
        return jax.lax.scan(step, carry, order.reshape(-1, batch_size))[0]

    return jax.lax.fori_loop(0, hyper.num_epochs, epoch, (params, tx.init(params)))[0]


def _log_probs(policy: Policy, params: PyTree, side: Side) -> Array:
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (side.state, side.trace))
    return policy.log_prob(params, observation_of(flat[0]), flat[1]).logp.sum(axis=1).reshape(side.valid.shape)


def _evaluate(policy: Policy, params: PyTree, toy: Toy, key: Array, num_episodes: int, max_step) -> tuple[Array, Array]:
    """Returns the share of successes and of completed stages `[K]`."""
    seed_key, play_key = jax.random.split(key)
    seeds = draw_seeds(seed_key, num_episodes)
    episodes = play_policy(policy, params, toy, seeds, play_key, max_step=max_step)
    stages = jax.vmap(functools.partial(action_stages, spec=toy.spec))(episodes.signals, episodes.valid)
    success = (episodes.signals.success & episodes.valid).any(axis=1)
    return success.mean(), stages.completed.mean(axis=0)
