"""Contexts of decisions (`Policy.encode`) that an actor leaves behind, so that learning need not compute them again."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stare_jax.models.observation import without_scene
from stare_jax.types import Array, PyTree

KEPT_ROW = "kept_row"
"""Name of the field of a decision's trace, int32, that says which row its context has; see `ContextStore`."""


class ContextStore:
    """Room on the devices for the contexts of a rollout, which `policy_act` fills in the order of its calls.

    Each of the P parts of a mesh's batches has R rows of its own. Row r of part p has the number p R + r.
    """

    def __init__(self, contexts: PyTree):
        """
        Args:
            contexts: leaves `[P, R, ...]`, whose memory the store takes.
        """
        self.contexts: PyTree | None = contexts
        self.num_parts, self.num_rows = jax.tree.leaves(contexts)[0].shape[:2]
        self.num_written = 0
        """rows of every part that were asked for; above R some have overwritten others."""

    @property
    def is_whole(self) -> bool:
        """True if every context that was made is there."""
        return self.num_written <= self.num_rows

    def write(self, make: Callable[[PyTree, np.int32], tuple[Any, PyTree]], num_rows: int) -> tuple[Any, np.ndarray]:
        """Calls `make(contexts, start) -> (result, contexts)`, which writes `num_rows` contexts from a row on.

        Returns:
            The result, and the numbers int32 `[num_rows]` of the rows.
        """
        share = num_rows // self.num_parts
        result, self.contexts = make(self.contexts, np.int32(self.num_written))
        rows = self.num_written + np.arange(share) + self.num_rows * np.arange(self.num_parts)[:, None]
        self.num_written += share
        return result, rows.astype(np.int32).reshape(-1)

    def take(self) -> PyTree:
        """Returns the contexts, which the store then no longer holds."""
        contexts, self.contexts = self.contexts, None
        return contexts


def write_rows(contexts: PyTree, new: PyTree, start: Array) -> PyTree:
    """Returns contexts `[P, R, ...]` with new ones `[B, ...]`, B / P for each part, from row `start` of it on."""

    def one(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new.reshape(x.shape[0], -1, *x.shape[2:]), start, axis=1)

    return jax.tree.map(one, contexts, new)


@functools.lru_cache(maxsize=16)
def jit_sample_and_keep(sample: Callable, encode: Callable) -> Callable:
    """Compiles (params, observation, key, tick, temperature, contexts, start) -> (Decision, contexts): `jit_sample` of
    `collect.py` in two parts, of which the first stays."""

    @functools.partial(jax.jit, donate_argnums=5)
    def sample_at(params, observation, key, tick, temperature, contexts, start):
        context = encode(params, observation)
        key = jax.random.fold_in(key, tick)
        decision = sample(params, without_scene(observation), key, temperature=temperature, context=context)
        return decision, write_rows(contexts, context, start)

    return sample_at
