"""Imitation: supervised fine-tuning on expert actions."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from jax.sharding import AbstractMesh

from stare_jax.config import Count, Seed, check_fields
from stare_jax.envs.seeds import phase_key
from stare_jax.logging import Interrupted, Window, progress, reduce_metrics, say
from stare_jax.models.augment import Augment, augment_images
from stare_jax.models.policy import Policy
from stare_jax.sharding import arrays
from stare_jax.sharding.mesh import check_batch_size
from stare_jax.sharding.microbatch import check_microbatch
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.optimizer import VALUE_PARAMS, OptimizerConfig, make_optimizer
from stare_jax.state.train_state import TrainState
from stare_jax.train import update
from stare_jax.train.loop import Run, checkpoint_directory, next_turn, save, start_phase
from stare_jax.types import Array, Observation, PyTree

PHASE = "sft"


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; the defaults are the paper's (B.1)."""

    num_steps: Count = 30_000
    """optimiser steps."""
    batch_size: Count = 64
    """frames of one optimiser step."""
    microbatch_size: Count | None = None
    """rows in one forward and backward pass; None takes the whole batch."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, freeze=(VALUE_PARAMS,))
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """decay of an exponential moving average of the parameters, which later phases and evaluation take; None: none."""
    augment: Augment = "none"
    """random changes of the images, a recipe of `models.augment`: "openvla", "openpi", or "none"."""
    seed: Seed = 0
    """seed of the loss's random numbers, such as the noise and the times of flow matching, and of `augment`."""
    log_every: Count = 20
    """steps."""
    checkpoint_every: Count = 1000
    """steps."""
    keep_checkpoints: Count = 2
    """newest checkpoints that are kept."""

    def __post_init__(self):
        check_fields(self)
        check_microbatch(self.microbatch_size, self.batch_size, "batch_size")


# ---- Batch ----------------------------------------------------------------------------------------------------------
class SFTBatch(NamedTuple):
    """Expert actions."""

    observation: Observation
    """leaves `[B, ...]`."""
    action: Array
    """float32 `[B, A]`, raw; `[B, H, A]` of policies that predict a window of H actions."""
    valid: Array
    """bool `[B]` or `[B, H]`: False beyond an episode's end, where its last action is repeated."""


def batch_shapes(config: SFTConfig, policy: Policy) -> SFTBatch:
    """Returns the batch of one optimiser step as `jax.ShapeDtypeStruct`s."""
    rows = (config.batch_size,) if policy.window is None else (config.batch_size, policy.window)
    return SFTBatch(
        observation=policy.observation_shape(config.batch_size),
        action=jax.ShapeDtypeStruct((*rows, policy.action_dim), jnp.float32),
        valid=jax.ShapeDtypeStruct(rows, bool),
    )


# ---- Step -----------------------------------------------------------------------------------------------------------
def make_sft_step(
    policy: Policy, tx: optax.GradientTransformation, config: SFTConfig
) -> Callable[[TrainState, SFTBatch], tuple[TrainState, update.Metrics]]:
    """Returns the step that minimises the mean of `policy.imitation_loss`."""

    def loss_fn(params, inputs):
        batch, key = inputs[0], jax.random.wrap_key_data(inputs[1])
        changes = jax.vmap(jax.random.fold_in, (0, None))(key, 1)
        images = augment_images(config.augment, batch.observation.images, changes)
        observation = batch.observation._replace(images=images)
        loss, metrics = policy.imitation_loss(params, observation, batch.action, valid=batch.valid, key=key)
        means = {f"sft/{name}": value.mean() for name, value in metrics.items()}
        return loss.mean(), means | {"sft/loss": loss.mean()}

    def step(state, batch):
        size = batch.action.shape[0]
        keys = jax.random.split(jax.random.fold_in(phase_key(config.seed, PHASE), state.step), size)
        inputs, weight = (batch, jax.random.key_data(keys)), jnp.ones(size, jnp.float32)
        grads, metrics = update.loss_gradients(loss_fn, state, inputs, weight, config.microbatch_size)
        state = update.apply_gradients(state, grads, tx, average_decay=config.ema_decay)
        return state, metrics

    return step


def check_mesh(config: SFTConfig, mesh: AbstractMesh) -> None:
    """Raises ShardingError where the mesh does not divide the batch."""
    check_batch_size("sft.batch_size", config.batch_size, mesh)
    check_batch_size("sft.microbatch_size", config.microbatch_size, mesh)


# ---- Loop -----------------------------------------------------------------------------------------------------------
def train_sft(
    policy: Policy,
    params: PyTree,
    batches: Callable[[int], Iterator[tuple[Observation, Array, Array]]],
    config: SFTConfig,
    run: Run,
) -> PyTree:
    """Trains on batches of expert actions and returns the parameters, averaged if `config.ema_decay` is set.

    Args:
        policy: policy whose `imitation_loss` is minimised.
        params: parameters to start from; consumed.
        batches: called with the number of steps already taken, returns an iterator over the fields of `SFTBatch`, with
            prompts, from there on; of each batch this process's rows (`arrays.to_mesh`).
        config: see `SFTConfig`.
        run: see `Run`.

    Raises:
        Interrupted: `run.should_stop` asked for it; a checkpoint has been saved.
        FloatingPointError: the loss is not finite.
        CheckpointError: see `loop.start_phase`.
    """
    check_mesh(config, run.mesh)
    tx = make_optimizer(config.optimizer, num_steps=config.num_steps)
    state, _ = start_phase(PHASE, run, policy, params, tx, config.optimizer, has_average=config.ema_decay is not None)
    del params
    step_fn = update.jit_step(make_sft_step(policy, tx, config), state)
    first = int(state.step)
    batch_iterator, window = batches(first), Window(PHASE, run.writer, num_steps=first)

    with (
        Checkpoints(checkpoint_directory(run, PHASE), keep=config.keep_checkpoints) as checkpoints,
        progress(config.num_steps, PHASE, "step", initial=first) as bar,
    ):
        for step in range(first + 1, config.num_steps + 1):
            with window.clock("data"):
                batch = SFTBatch(*next(batch_iterator))
            with window.clock("update"), run.profiler.step(PHASE, step):
                state, metrics = step_fn(state, arrays.to_mesh(batch, run.mesh))
            window.add(metrics)
            turn = next_turn(
                run, step, config.num_steps, log_every=config.log_every, checkpoint_every=config.checkpoint_every
            )

            if turn.is_reporting:
                updates = window.read(state.trainable)
                means = reduce_metrics(updates)
                window.write(step, means, frames=len(updates) * config.batch_size)
                bar.update(len(updates), loss=means["sft/loss"])

            if turn.is_saving:
                save(checkpoints, step, state, run, {})
            if turn.is_stopping:
                raise Interrupted(f"{PHASE}: stopped and saved at step {step} of {config.num_steps}")
    say(f"{PHASE}: {config.num_steps - first} steps | {window.clock.total_line()}")
    return state.result
