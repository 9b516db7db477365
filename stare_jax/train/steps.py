"""The optimiser steps of the phases: `make_*_step(policy, tx, config)` -> pure (state, batch) -> (state, metrics)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stare_jax.losses import ppo_loss, reference_penalty, sta_tpo_loss, tpo_loss
from stare_jax.models.policy import Policy
from stare_jax.state.optimizer import decay_schedule, frozen_params, merge_params, split_params
from stare_jax.train.update import cut, gradients, sum_over_parts, uncut
from stare_jax.types import Array, Observation, PyTree, TrainState

Metrics = dict[str, Array]


class SFTBatch(NamedTuple):
    """Expert actions."""

    observation: Observation
    """leaves `[B, ...]`."""
    action: Array
    """float32 `[B, A]`, raw; `[B, H, A]` of policies with a window."""
    valid: Array
    """bool `[B]` or `[B, H]`: False beyond an episode's end, where its last action is repeated."""


class DecisionBatch(NamedTuple):
    """Decisions of rollouts, in any order."""

    observation: Observation
    """leaves `[B, ...]`."""
    trace: dict[str, Array]
    """`[B, ...]`, see `Decision.trace`."""
    old_logp: Array
    """float32 `[B]`, and likewise below."""
    old_value: Array
    advantage: Array
    return_: Array
    valid: Array
    """bool `[B]`: False in rows that only fill up the batch."""


class ScoredTrajectory(NamedTuple):
    """One side of B preference pairs, with all that does not depend on the parameters that are trained.

    N actions come from D = ceil(N / C) decisions. The loss sums M scores: M is D where a decision has one, its
    log-probability, and N for a policy with a `preference_score`, which scores each action.
    """

    observation: Observation
    """leaves `[B, D, ...]` of the states in which decisions were made."""
    decision: PyTree
    """the traces of the decisions, leaves `[B, D, ...]`, or float32 `[B, D, H, A]`, the actions from each on, for a
    policy with a `preference_score`."""
    seed: Array
    """uint32 `[B, D, G]` of its G estimates, the same for both sides of a pair; G is 1 where there is but one."""
    ref_logp: Array
    """float32 `[B, M, G]`."""
    valid: Array
    """bool `[B, M]`: which decisions or actions exist."""
    stage_mask: Array
    """bool `[B, K, M]`."""
    stage_cost: Array
    """float32 `[B, K]`."""
    completed: Array
    """bool `[B, K]`."""


class PairBatch(NamedTuple):
    """Preference pairs."""

    chosen: ScoredTrajectory
    rejected: ScoredTrajectory


def check_microbatch(microbatch_size: int | None, size: int, name: str) -> None:
    """Raises ValueError unless `microbatch_size` is None or divides the batch size, whose config field is `name`."""
    if microbatch_size is not None and (microbatch_size < 1 or size % microbatch_size):
        raise ValueError(f"microbatch_size: got {microbatch_size}, expected a divisor of {name} = {size}, or None")


def make_sft_step(policy: Policy, tx: optax.GradientTransformation, config) -> Callable:
    """Imitation: (state, `SFTBatch`) -> the mean of `policy.imitation_loss`; config is an `SFTConfig`."""

    def loss_fn(params, inputs):
        batch, keys = inputs
        rest = {"valid": batch.valid, "key": jax.random.wrap_key_data(keys)}
        loss, metrics = policy.imitation_loss(params, batch.observation, batch.action, **rest)
        means = {f"sft/{name}": value.mean() for name, value in metrics.items()}
        return loss.mean(), means | {"sft/loss": loss.mean()}

    freeze = frozen_params(policy, config.optimizer)

    def step(state, batch):
        size = batch.action.shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), size)
        inputs, weight = (batch, jax.random.key_data(keys)), jnp.ones(size)
        grads, metrics = gradients(loss_fn, state, inputs, weight, freeze, config.microbatch_size)
        return _apply(state, grads, tx, freeze), metrics | _norms(grads)

    return step


def make_ppo_step(policy: Policy, tx: optax.GradientTransformationExtraArgs, config) -> Callable:
    """PPO (2): (state, `DecisionBatch`, train_policy, fraction_done, reference) -> `ppo_loss`; config is a `PPOConfig`.

    Where the approximate KL divergence of the batch is above `config.target_kl` the step changes nothing and says so in
    `ppo/stopped`. `train_policy` False moves the value head alone. `fraction_done`, of all iterations, is where
    `config.optimizer.schedule` stands; the optimiser itself has none. `reference` are the trained parameters of the
    policy that the loss may keep to, None where `config.kl_coef` is.
    """
    freeze, temperature = frozen_params(policy, config.optimizer), config.temperature

    def loss_fn(params, batch, reference):
        if config.kl_coef is not None:
            reference = merge_params(reference, split_params(params, freeze)[1])
        decisions = (batch.observation, batch.trace)
        score = policy.log_prob(params, *decisions, temperature=temperature, reference_params=reference)
        data = (score.logp, batch.old_logp, batch.advantage, score.value, batch.old_value, batch.return_)
        loss, metrics = ppo_loss(
            *data,
            score.entropy,
            batch.valid,
            clip_eps=config.clip_eps,
            clip_eps_high=config.clip_eps_high,
            dual_clip=config.dual_clip,
            value_coef=config.value_coef,
            value_clip_eps=config.value_clip_eps,
            huber_delta=config.huber_delta,
            entropy_coef=config.entropy_coef,
        )
        if config.kl_coef is None:
            return loss, metrics
        penalty, penalty_metrics = reference_penalty(score.divergence, batch.valid, kl_coef=config.kl_coef)
        return loss + penalty, metrics | penalty_metrics | {"ppo/loss": loss + penalty}

    def step(state, batch, train_policy, fraction_done, reference=None):
        weight, loss = batch.valid.astype(jnp.float32), functools.partial(loss_fn, reference=reference)
        grads, metrics = gradients(loss, state, batch, weight, freeze, config.microbatch_size)
        is_far = metrics["ppo/approx_kl"] > (jnp.inf if config.target_kl is None else config.target_kl)
        scale = jnp.float32(decay_schedule(config.optimizer.schedule, 1.0, 1.0)(fraction_done))

        def move(state):
            return _apply(state, grads, tx, freeze, scale=scale, train_policy=train_policy)

        state = jax.lax.cond(is_far, lambda state: state, move, state)
        return state, metrics | _norms(grads) | {"ppo/stopped": is_far.astype(jnp.float32), "ppo/lr_scale": scale}

    return step


def make_tpo_step(policy: Policy, tx: optax.GradientTransformation, config) -> Callable:
    """TPO and STA-TPO (1, 6): (state, `PairBatch`) -> the preference loss; config is a `TPOConfig`.

    The loss couples all decisions of a pair. With `config.microbatch_size` set, a first pass without gradient gives the
    derivative of the loss by every log-probability, which weights the gradients of the second pass; this is exact.
    """

    freeze = frozen_params(policy, config.optimizer)

    def step(state, batch):
        trainable, frozen = split_params(state.params, freeze)
        batch = _pick_draws(batch, state.step, config.draws_per_step)
        decisions = _decisions(batch)
        num_pairs, num_scores = batch.chosen.valid.shape

        def logp_fn(params, decisions):
            params, (observation, decision, seed) = merge_params(params, frozen), decisions
            if policy.preference_score is None:
                return policy.log_prob(params, observation, decision).logp[:, None]
            return policy.preference_score(params, observation, decision, seed).mean(axis=1)

        def loss_of_logp(logp):
            logp = logp.reshape(num_pairs, 2, -1, logp.shape[1])
            return _preference_loss(flatten_scores(logp, num_scores), batch, config)

        if config.microbatch_size is None:
            grads, metrics = jax.grad(lambda params: loss_of_logp(logp_fn(params, decisions)), has_aux=True)(trainable)
        else:
            size = len(decisions[2])
            parts = cut(decisions, config.microbatch_size)
            logp = uncut(jax.lax.map(lambda part: logp_fn(trainable, part), parts), size)
            weight, metrics = jax.grad(loss_of_logp, has_aux=True)(logp)
            grads = sum_over_parts(
                lambda part, weight: jax.grad(lambda params: jnp.vdot(logp_fn(params, part), weight))(trainable),
                (parts, cut(weight, config.microbatch_size)),
            )
        return _apply(state, grads, tx, freeze), metrics | _norms(grads)

    return step


def flatten_scores(score: Array, num_scores: int) -> Array:
    """Returns scores of decisions `[..., D, C or 1]`, C where each action has its own, in order, `[..., M]`.

    The last decision may have executed fewer actions than C.
    """
    return score.reshape(*score.shape[:-2], -1)[..., :num_scores]


def jit_step(step: Callable, policy: Policy, config, state: TrainState) -> Callable:
    """Compiles a step so that the state it is given is reused for the one it returns, but for what is frozen.

    Frozen parameters go in and do not come out, so that others may share them: the weights of a large model are in
    memory once.

    Args:
        step: of `make_*_step`.
        policy: whose step it is.
        config: what the step was made with.
        state: where it lies, the states that the step returns will lie; `abstract_state` will do.
    """
    freeze = frozen_params(policy, config.optimizer)
    move = _jit_move(step, freeze, state)

    @functools.wraps(step)
    def compiled_step(state, *inputs):
        trainable, frozen = split_params(state.params, freeze)
        moved, metrics = move(state.replace(params=trainable), frozen, *inputs)
        return moved.replace(params=merge_params(moved.params, frozen)), metrics

    return compiled_step


def lower_step(step: Callable, policy: Policy, config, state: TrainState, *inputs) -> jax.stages.Lowered:
    """Lowers what `jit_step` compiles, for arrays or for `jax.ShapeDtypeStruct`s with shardings."""
    freeze = frozen_params(policy, config.optimizer)
    trainable, frozen = split_params(state.params, freeze)
    return _jit_move(step, freeze, state).lower(state.replace(params=trainable), frozen, *inputs)


def _jit_move(step: Callable, freeze: Sequence[str], state: TrainState) -> Callable:
    """Compiles (state of what is trained, frozen parameters, *inputs) -> (state of what is trained, metrics)."""
    layout = state.replace(params=split_params(state.params, freeze)[0])
    # Left to the compiler, some leaves would lie elsewhere after the first step, and the second be compiled anew.
    out_shardings = (jax.tree.map(lambda x: x.sharding, layout), None)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def move(moving, frozen, *inputs):
        state, metrics = step(moving.replace(params=merge_params(moving.params, frozen)), *inputs)
        return state.replace(params=split_params(state.params, freeze)[0]), metrics

    return move


def _preference_loss(logp: Array, batch: PairBatch, config) -> tuple[Array, Metrics]:
    """The loss of `[B, 2, M]` log-probabilities, chosen first."""
    chosen, rejected = batch
    ref_logp = (side.ref_logp.mean(axis=-1) for side in batch)
    chosen_ref_logp, rejected_ref_logp = ref_logp
    scores = (logp[:, 0], chosen_ref_logp, logp[:, 1], rejected_ref_logp, chosen.valid, rejected.valid)
    if config.variant == "tpo":
        return _anchored(*tpo_loss(*scores, beta=config.beta), logp, chosen.valid, config.anchor_coef)
    loss, metrics = sta_tpo_loss(
        *scores,
        chosen.stage_mask,
        rejected.stage_mask,
        chosen.stage_cost,
        rejected.stage_cost,
        chosen.completed,
        rejected.completed,
        beta=config.beta,
        cost_coef=config.cost_coef,
        stage_norm=config.stage_norm,
        margin=config.margin,
    )
    return _anchored(loss, metrics, logp, chosen.valid, config.anchor_coef)


def _anchored(
    loss: Array, metrics: Metrics, logp: Array, chosen_valid: Array, anchor_coef: float
) -> tuple[Array, Metrics]:
    """Adds minus the mean log-probability of chosen actions to a preference loss."""
    num_actions = jnp.maximum(chosen_valid.sum(), 1)
    chosen_logp = jnp.sum(jnp.where(chosen_valid, logp[:, 0], 0.0)) / num_actions
    loss = loss - anchor_coef * chosen_logp if anchor_coef else loss
    return loss, metrics | {"tpo/loss": loss, "tpo/chosen_logp": chosen_logp}


def _pick_draws(batch: PairBatch, step: Array, size: int) -> PairBatch:
    """Keeps the estimates that a step uses, of all that the reference was asked for; they take turns."""
    num_draws = batch.chosen.seed.shape[-1]
    index = (step * size + jnp.arange(min(size, num_draws))) % num_draws
    return PairBatch(*(side._replace(seed=side.seed[..., index], ref_logp=side.ref_logp[..., index]) for side in batch))


def _decisions(batch: PairBatch) -> tuple[Observation, PyTree, Array]:
    """Observations, decisions and seeds of both sides, `[B * 2 * D, ...]`; rows stay with their pair, and so on their
    device."""

    def flatten(chosen, rejected):
        both = jnp.stack([chosen, rejected], axis=1)
        return both.reshape(math.prod(both.shape[:3]), *both.shape[3:])  # -1 fails on a state of size zero

    sides = [(side.observation, side.decision, side.seed) for side in batch]
    return jax.tree.map(flatten, *sides)


def _apply(
    state: TrainState,
    grads: PyTree,
    tx: optax.GradientTransformation,
    freeze: Sequence[str],
    *,
    scale: Array | float = 1.0,
    **extra,
) -> TrainState:
    trainable, frozen = split_params(state.params, freeze)
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, trainable)
    updates, opt_state = tx.update(grads, state.opt_state, trainable, **extra)
    updates = optax.tree.scale(scale, updates)
    params = merge_params(optax.apply_updates(trainable, updates), frozen)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state)


def _norms(grads: PyTree) -> Metrics:
    return {"grad/norm": optax.tree.norm(grads)}
