"""Gradients of batches whose forward and backward pass does not fit into memory.

A batch is cut into microbatches whose gradients are added up; the gradient is that of the whole batch, the metrics are
means over its parts.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from stare_jax.state.optimizer import merge_params, split_params
from stare_jax.types import Array, PyTree, TrainState


def gradients(
    loss_fn: Callable,
    state: TrainState,
    batch: PyTree,
    weight: Array,
    freeze: Sequence[str],
    microbatch_size: int | None,
) -> tuple[PyTree, dict[str, Array]]:
    """Gradient of the trainable parameters and metrics; parts of a batch count by their sum of `weight` `[B]`."""
    trainable, frozen = split_params(state.params, freeze)

    def grad_fn(part):
        return jax.grad(lambda params: loss_fn(merge_params(params, frozen), part), has_aux=True)(trainable)

    if microbatch_size is None:
        return grad_fn(batch)
    total = jnp.maximum(weight.sum(), 1e-8)

    def share(part, weight):
        fraction = weight.sum() / total
        return jax.tree.map(lambda x: jnp.where(fraction > 0, fraction * x, 0.0), grad_fn(part))

    return sum_over_parts(share, (cut(batch, microbatch_size), cut(weight, microbatch_size)))


def cut(tree: PyTree, size: int) -> PyTree:
    """Cuts leaves `[D, ...]` into `[ceil(D / size), size, ...]`, filled up with zeros.

    Rows are dealt out in turn, so that every part has rows of every device.
    """

    def one(x):
        num_parts = -(-x.shape[0] // size)
        x = jnp.pad(x, [(0, num_parts * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, num_parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, tree)


def uncut(parts: Array, size: int) -> Array:
    """The inverse of `cut` for one array of `size` rows."""
    return parts.swapaxes(0, 1).reshape(math.prod(parts.shape[:2]), *parts.shape[2:])[:size]


def sum_over_parts(fn: Callable, parts: tuple) -> PyTree:
    """Returns the sum of fn(*part) over the leading axis of `parts`, in float32, one part in memory at a time."""
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, fn(*part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return total
