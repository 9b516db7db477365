"""Preference: TPO on whole trajectories, STA-TPO stage by stage, and the control that uses the chosen ones alone."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

from stare_jax.config import Count, NonNegative, Positive, Seed, check_fields
from stare_jax.data.pairs import pair_indices
from stare_jax.data.scores import keep_scores
from stare_jax.logging import Interrupted, Window, progress, reduce_metrics, say
from stare_jax.losses import Margin, StageNorm, sta_tpo_loss, tpo_loss
from stare_jax.models.nn.lora import drop_adapters
from stare_jax.models.policy import Policy
from stare_jax.sharding import arrays, pod
from stare_jax.sharding.mesh import check_batch_size
from stare_jax.sharding.microbatch import map_rows, reduce_parts, split_rows
from stare_jax.stages import TaskSpecs
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import VALUE_PARAMS, OptimizerConfig, make_optimizer, merge_params
from stare_jax.state.train_state import TrainState, abstract_params
from stare_jax.train import update
from stare_jax.train.loop import Run, checkpoint_directory, next_turn, save, start_phase
from stare_jax.train.tpo_reference import PairBatch, ScoredTrajectory, check_reference, flatten_scores, score_pairs
from stare_jax.types import Array, Observation, PreferencePair, PyTree

PHASE = "tpo"


@dataclasses.dataclass(frozen=True)
class TPOConfig:
    """TPO and STA-TPO; learning rate and optimiser are the paper's (B.2)."""

    variant: Literal["sta_tpo", "tpo", "imitation"] = "sta_tpo"
    """"sta_tpo" (6), "tpo" (1), or "imitation": minus the mean log-probability of the chosen actions, which is no
    preference at all; the rejected trajectories are of no effect on it."""
    num_epochs: Count = 5
    """passes over the pairs."""
    batch_size: Count = 4
    """pairs of one optimiser step."""
    microbatch_size: Count | None = None
    """decisions in one forward and backward pass; None takes all of a batch of pairs."""
    beta: Positive = 0.1
    """factor of the differences from the reference in (1) and (6)."""
    cost_coef: NonNegative = 10.0
    """lambda, weight of the stage costs (STA-TPO)."""
    stage_norm: StageNorm = "K"
    """see `losses.sta_tpo_loss`."""
    margin: Margin = "paper"
    """see `losses.sta_tpo_loss`."""
    anchor_coef: NonNegative = 0.0
    """weight of minus the mean log-probability of the chosen actions, which keeps it from falling together with that of
    the rejected ones; the paper has none."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, freeze=(VALUE_PARAMS,))
    reference: Literal["start", "base"] = "start"
    """policy that the trained one is compared with: "start", the policy the phase starts from, adapters included;
    "base", the same with its adapters off. Neither is a second copy of the weights."""
    num_draws: Count = 16
    """noises and times at which a flow policy's reference is asked about every decision, once, before the first step;
    policies with a log-probability need none of them."""
    draws_per_step: Count = 8
    """number of these that a step uses; they take turns."""
    reference_batch_size: Count = 64
    """decisions that the reference policy scores at a time, once, before the first step."""
    seed: Seed = 0
    """seed of the order of pairs."""
    log_every: Count = 1
    """steps."""
    checkpoint_every: Count = 100
    """steps."""
    keep_checkpoints: Count = 2
    """newest checkpoints that are kept."""

    def __post_init__(self):
        check_fields(self)
        if self.num_draws % self.draws_per_step:
            expected = f"a divisor of num_draws = {self.num_draws}"
            raise ValueError(f"draws_per_step: got {self.draws_per_step}, expected {expected}")


# ---- Batch: `tpo_reference.PairBatch` -------------------------------------------------------------------------------
def batch_shapes(config: TPOConfig, policy: Policy, *, horizon: int, num_stages: int) -> PairBatch:
    """Returns the batch of one optimiser step as `jax.ShapeDtypeStruct`s.

    Args:
        config: see `TPOConfig`.
        policy: policy that is trained.
        horizon: N, actions of an episode.
        num_stages: K.
    """
    size, num_decisions = config.batch_size, -(-horizon // policy.chunk)
    is_exact = policy.preference_score is None
    num_draws, num_scores = (1, num_decisions) if is_exact else (config.num_draws, horizon)
    array, observation = jax.ShapeDtypeStruct, policy.observation_shape(1)

    def rows(tree):
        return jax.tree.map(lambda x: array((size, num_decisions, *x.shape[1:]), x.dtype), tree)

    if is_exact:
        params = jax.eval_shape(policy.init, jax.random.key(0))
        decision = rows(jax.eval_shape(policy.sample, params, observation, jax.random.key(0)).trace)
    else:
        decision = array((size, num_decisions, policy.window, policy.action_dim), jnp.float32)
    side = ScoredTrajectory(
        observation=rows(observation),
        decision=decision,
        seed=array((size, num_decisions, num_draws), jnp.uint32),
        ref_logp=array((size, num_scores, num_draws), jnp.float32),
        valid=array((size, num_scores), bool),
        stage_mask=array((size, num_stages, num_scores), bool),
        stage_cost=array((size, num_stages), jnp.float32),
        completed=array((size, num_stages), bool),
    )
    return PairBatch(side, side)


# ---- Step -----------------------------------------------------------------------------------------------------------
def make_tpo_step(
    policy: Policy, tx: optax.GradientTransformation, config: TPOConfig
) -> Callable[[TrainState, PairBatch], tuple[TrainState, update.Metrics]]:
    """Returns the step that minimises the loss of TPO (1) or STA-TPO (6).

    The loss couples all decisions of a pair. With `config.microbatch_size` set, a first pass without gradient gives the
    derivative of the loss by every log-probability, which weights the gradients of the second pass; this is exact.
    """

    def step(state, batch):
        batch = _pick_draws(batch, state.step, config.draws_per_step)
        decisions = _decisions(batch)
        num_pairs, num_scores = batch.chosen.valid.shape

        def logp_fn(trainable, decisions):
            params, (observation, decision, seed) = merge_params(trainable, state.frozen), decisions
            if policy.preference_score is None:
                return policy.log_prob(params, observation, decision).logp.sum(axis=1, keepdims=True)
            return policy.preference_score(params, observation, decision, seed).mean(axis=1)

        def loss_of_logp(logp):
            logp = logp.reshape(num_pairs, 2, -1, logp.shape[1])
            return _preference_loss(flatten_scores(logp, num_scores), batch, config)

        if config.microbatch_size is None:
            loss_fn = jax.grad(lambda trainable: loss_of_logp(logp_fn(trainable, decisions)), has_aux=True)
            grads, metrics = loss_fn(state.trainable)
        else:
            logp = map_rows(functools.partial(logp_fn, state.trainable), decisions, config.microbatch_size)
            weight, metrics = jax.grad(loss_of_logp, has_aux=True)(logp)

            def weighted(part, weight):
                return jax.grad(lambda trainable: jnp.vdot(logp_fn(trainable, part), weight))(state.trainable), {}

            parts = split_rows((decisions, weight), config.microbatch_size)
            grads, _ = reduce_parts(weighted, parts)
        return update.apply_gradients(state, grads, tx), metrics | {"grad/norm": optax.tree.norm(grads)}

    return step


def _preference_loss(logp: Array, batch: PairBatch, config: TPOConfig) -> tuple[Array, update.Metrics]:
    """The loss of `[B, 2, M]` scores, chosen first; an imitation has the metrics of TPO."""
    chosen, rejected = batch
    chosen_ref_logp, rejected_ref_logp = (side.ref_logp.mean(axis=-1) for side in batch)
    scores = (logp[:, 0], chosen_ref_logp, logp[:, 1], rejected_ref_logp, chosen.valid, rejected.valid)
    if config.variant != "sta_tpo":
        loss, metrics = tpo_loss(*scores, beta=config.beta)
    else:
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
    num_actions = jnp.maximum(chosen.valid.sum(), 1)
    chosen_logp = jnp.sum(jnp.where(chosen.valid, logp[:, 0], 0.0)) / num_actions
    if config.variant == "imitation":
        loss = -chosen_logp
    if config.anchor_coef:
        loss = loss - config.anchor_coef * chosen_logp
    return loss, metrics | {"tpo/loss": loss, "tpo/chosen_logp": chosen_logp}


def _pick_draws(batch: PairBatch, step: Array, size: int) -> PairBatch:
    """Keeps the estimates that a step uses, of all that the reference was asked for; they take turns."""
    num_draws = batch.chosen.seed.shape[-1]
    index = (step * size + jnp.arange(min(size, num_draws))) % num_draws
    return PairBatch(*(side._replace(seed=side.seed[..., index], ref_logp=side.ref_logp[..., index]) for side in batch))


def _decisions(batch: PairBatch) -> tuple[Observation, PyTree, Array]:
    """Returns observations, decisions and seeds of both sides, `[B * 2 * D, ...]`; rows stay with their pair, and so on
    their device."""

    def flatten(chosen, rejected):
        both = jnp.stack([chosen, rejected], axis=1)
        return both.reshape(math.prod(both.shape[:3]), *both.shape[3:])  # -1 fails on a state of size zero

    sides = [(side.observation, side.decision, side.seed) for side in batch]
    return jax.tree.map(flatten, *sides)


def check_mesh(config: TPOConfig, mesh: AbstractMesh) -> None:
    """Raises ShardingError where the mesh does not divide a batch."""
    check_batch_size("tpo.batch_size", config.batch_size, mesh)
    check_batch_size("tpo.microbatch_size", config.microbatch_size, mesh)


# ---- Loop -----------------------------------------------------------------------------------------------------------
def train_tpo(
    policy: Policy, params: PyTree, pairs: PreferencePair, spec: TaskSpecs, config: TPOConfig, run: Run
) -> PyTree:
    """Trains on preference pairs and returns the parameters.

    Args:
        policy: policy whose `log_prob` is compared.
        params: parameters to start from, and at the same time those of the reference policy (`TPOConfig.reference`);
            consumed.
        pairs: NumPy leaves `[P, ...]`.
        spec: the task's stages; of several tasks all, of which `pairs.task` are indices.
        config: see `TPOConfig`.
        run: see `Run`.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved if there was a first step.
        FloatingPointError: the loss is not finite.
        ConfigError: the reference is to be the base of a policy that has no adapters.
        CheckpointError: see `loop.start_phase`.
    """
    check_mesh(config, run.mesh)
    check_reference(config.reference, params)
    if not (num_pairs := len(pairs.chosen.valid)):
        raise ValueError("pairs: got none, expected at least one")
    num_steps = math.ceil(config.num_epochs * num_pairs / config.batch_size)

    # ---- Reference, before its parameters are consumed --------------------------------------------------------------
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract_params(policy, run.mesh)))
    scored = score_pairs(
        policy,
        arrays.on_host(drop_adapters(params) if config.reference == "base" else params),
        pairs,
        spec,
        batch_size=config.reference_batch_size,
        num_draws=config.num_draws,
        should_stop=run.should_stop,
        keep=keep_scores(run.directory, run.start and f"{run.start}, {config.reference}"),
    )
    tx = make_optimizer(config.optimizer, num_steps=num_steps)
    state, _ = start_phase(PHASE, run, policy, params, tx, config.optimizer)
    del params
    step_fn = update.jit_step(make_tpo_step(policy, tx, config), state)
    first = int(state.step)
    window = Window(PHASE, run.writer, num_steps=first)

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(num_steps, PHASE, "step", initial=first) as bar,
    ):
        for step in range(first + 1, num_steps + 1):
            with window.clock("data"):
                rows = pair_indices(step - 1, num_pairs=num_pairs, batch_size=config.batch_size, seed=config.seed)
                batch = jax.tree.map(operator.itemgetter(pod.share(rows)), scored)
            with window.clock("update"), run.profiler.step(PHASE, step):
                state, metrics = step_fn(state, arrays.to_mesh(batch, run.mesh))
            window.add(metrics)
            turn = next_turn(run, step, num_steps, log_every=config.log_every, checkpoint_every=config.checkpoint_every)

            if turn.is_reporting:
                updates = window.read(state.trainable)
                means = reduce_metrics(updates)
                window.write(step, means, pairs=len(updates) * config.batch_size)
                bar.update(len(updates), loss=means["tpo/loss"], accuracy=means["tpo/accuracy"])

            if turn.is_saving:
                save(checkpoints, step, state, run, {})
            if turn.is_stopping:
                raise Interrupted(f"{PHASE}: stopped and saved at step {step} of {num_steps}")
    say(f"{PHASE}: {num_steps - first} steps | {window.clock.total_line()}")
    return state.result
