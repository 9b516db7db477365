"""The parts of an optimiser step that do not depend on its loss: microbatches, gradients, the update, the compilation.

A batch whose forward and backward pass does not fit into memory is split into microbatches whose gradients are added
up. The gradient is that of the whole batch; metrics are means over its parts, minima and maxima extremes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stare_jax.logging import announce_compiling
from stare_jax.sharding.microbatch import REDUCTIONS, Metrics, reduce_parts, split_rows
from stare_jax.state.optimizer import merge_params
from stare_jax.state.train_state import TrainState
from stare_jax.types import Array, PyTree


def loss_gradients(
    loss_fn: Callable[[PyTree, PyTree], tuple[Array, Metrics]],
    state: TrainState,
    batch: PyTree,
    weight: Array,
    microbatch_size: int | None,
) -> tuple[PyTree, Metrics]:
    """Returns the gradient of a loss by the trainable parameters, and the loss's metrics with the gradient's norm.

    Args:
        loss_fn: (all parameters, rows of the batch) -> (the mean over these rows, metrics).
        state: parameters at which the gradient is taken.
        batch: leaves `[B, ...]`.
        weight: float32 `[B]`; microbatches count by the sum of their rows' weights.
        microbatch_size: rows in one forward and backward pass; None takes the whole batch.
    """

    def grad_fn(part):
        by_trainable = jax.grad(lambda x: loss_fn(merge_params(x, state.frozen), part), has_aux=True)
        return by_trainable(state.trainable)

    if microbatch_size is None:
        grads, metrics = grad_fn(batch)
        return grads, metrics | {"grad/norm": optax.tree.norm(grads)}
    total = jnp.maximum(weight.sum(), 1e-8)

    def share(part, weight):
        fraction = weight.sum() / total
        grads, metrics = grad_fn(part)
        extremes = {name: value for name, value in metrics.items() if name[-4:] in REDUCTIONS}
        means = {name: value for name, value in metrics.items() if name not in extremes}
        # A part without a valid row may have any metrics.
        extremes = {n: jnp.where(fraction > 0, x, REDUCTIONS[n[-4:]][1]) for n, x in extremes.items()}
        return jax.tree.map(lambda x: jnp.where(fraction > 0, fraction * x, 0.0), (grads, means)), extremes

    parts = (split_rows(batch, microbatch_size), split_rows(weight, microbatch_size))
    (grads, means), extremes = reduce_parts(share, parts)
    return grads, means | extremes | {"grad/norm": optax.tree.norm(grads)}


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    tx: optax.GradientTransformation,
    *,
    scale: Array | float = 1.0,
    average_decay: float | None = None,
    **extra: Array,
) -> TrainState:
    """Returns the state after one step of the optimiser.

    Args:
        state: before.
        grads: of the trainable parameters.
        tx: the optimiser.
        scale: factor of the updates.
        average_decay: share of the average that remains; None where none is kept.
        extra: keyword arguments of `tx.update`.
    """
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.trainable)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable, **extra)
    trainable = optax.apply_updates(state.trainable, optax.tree.scale(scale, updates))
    average = state.average
    if average_decay is not None:
        average = optax.incremental_update(trainable, average, 1 - average_decay)
    return TrainState(state.step + 1, trainable, state.frozen, opt_state, average)


def jit_step(step: Callable, state: TrainState) -> Callable:
    """Compiles a step (state, *inputs) -> (state, metrics) so that the memory of a state is reused for the next one.

    The first call says that it takes long. Frozen parameters go in and do not come out, so that others may share them:
    the weights of a large model are in memory once.

    Args:
        step: see `make_sft_step`, `make_tpo_step`, `make_ppo_step`.
        state: a state, or the layout of one (`abstract_state`); those that the step returns will lie as this one does.
    """
    move = announce_compiling("compiling the training step", _jit_move(step, state))

    @functools.wraps(step)
    def compiled_step(state, *inputs):
        moved, metrics = move(state.replace(frozen=None), state.frozen, *inputs)
        return moved.replace(frozen=state.frozen), metrics

    return compiled_step


def lower_step(step: Callable, state: TrainState, *inputs: Any) -> jax.stages.Lowered:
    """Lowers the program that `jit_step` compiles, for arrays or for `jax.ShapeDtypeStruct`s with shardings."""
    return _jit_move(step, state).lower(state.replace(frozen=None), state.frozen, *inputs)


def _jit_move(step: Callable, state: TrainState) -> Callable:
    """Compiles (state without frozen parameters, frozen parameters, *inputs) -> (state without them, metrics)."""
    # Left to the compiler, some leaves would lie elsewhere after the first step, and the second be compiled anew.
    # Metrics are whole on every device, so that every process can read them.
    out_shardings = (jax.tree.map(lambda x: x.sharding, state.replace(frozen=None)), state.step.sharding)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def move(moving, frozen, *inputs):
        state, metrics = step(moving.replace(frozen=frozen), *inputs)
        return state.replace(frozen=None), metrics

    return move
