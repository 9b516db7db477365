"""Microbatches: the rows of a batch in parts, of which one at a time is in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stare_jax.types import Array, PyTree

Metrics = dict[str, Array]
REDUCTIONS = {"_min": (jnp.minimum, jnp.inf), "_max": (jnp.maximum, -jnp.inf)}
"""End of a metric's name -> (reduction, its neutral element); all other metrics are averaged."""


def split_rows(tree: PyTree, size: int) -> PyTree:
    """Splits leaves `[D, ...]` into `[ceil(D / size), size, ...]`, filled up with zeros.

    Rows are dealt out in turn, so that every part has rows of every device.
    """

    def one(x):
        num_parts = -(-x.shape[0] // size)
        x = jnp.pad(x, [(0, num_parts * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, num_parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, tree)


def map_rows(fn: Callable[[PyTree], Array], rows: PyTree, microbatch_size: int | None) -> Array:
    """Returns fn(rows), `[D, ...]`, computed in the parts of `split_rows`; of all at once without a size."""
    if microbatch_size is None:
        return fn(rows)
    parts = jax.lax.map(fn, split_rows(rows, microbatch_size))
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[: len(jax.tree.leaves(rows)[0])]


def reduce_parts(fn: Callable[..., tuple[PyTree, Metrics]], parts: tuple) -> tuple[PyTree, Metrics]:
    """Reduces fn(*part) = (terms, extremes) over the leading axis of `parts`, one part in memory at a time.

    Args:
        fn: its terms are added up in float32, its extremes reduced by their names (`REDUCTIONS`).
        parts: leaves `[P, ...]`.
    """
    shapes, names = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    neutral = {name: jnp.float32(REDUCTIONS[name[-4:]][1]) for name in names}

    def add(total, part):
        (terms, extremes), (sums, so_far) = fn(*part), total
        so_far = {name: REDUCTIONS[name[-4:]][0](x, extremes[name]) for name, x in so_far.items()}
        return (jax.tree.map(jnp.add, sums, terms), so_far), None

    total, _ = jax.lax.scan(add, (zeros, neutral), parts)
    return total


def check_microbatch(microbatch_size: int | None, size: int, name: str) -> None:
    """Raises ValueError unless `microbatch_size` is None or divides the batch size, whose config field is `name`."""
    if microbatch_size is not None and (microbatch_size < 1 or size % microbatch_size):
        raise ValueError(f"microbatch_size: got {microbatch_size}, expected a divisor of {name} = {size}, or None")
