"""Types and layouts of parameters: that in which frozen ones are stored, and those in which sampling reads all."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stare_jax.types import PyTree


def store_as(params: PyTree, patterns: Sequence[str], dtype: str) -> PyTree:
    """Returns parameters with those that one of the regexes matches in another type; others are the same arrays."""

    def store(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_other = leaf.dtype != jnp.dtype(dtype) and any(re.search(pattern, name) for pattern in patterns)
        return leaf.astype(dtype) if is_other else leaf

    return jax.tree.map_with_path(store, params)


def unstack(layers: PyTree, depth: int) -> tuple[PyTree, ...]:
    """Returns the parameters of each layer as arrays of their own, copied out of their stack.

    XLA's compilers for GPUs and CPUs copy a layer out of the stack wherever a matrix product reads it, which takes most
    of the product's time when there are few tokens. The copies made here serve all tokens of a rollout.

    Args:
        layers: leaves `[depth, ...]`.
        depth: number of layers.
    """
    return tuple(jax.tree.map(lambda x: x[i], layers) for i in range(depth))  # noqa: B023
