"""States of training that are not finite: found before they are saved."""

import platform

import jax
import jax.numpy as jnp

from stare_jax.sharding.mesh import path_name
from stare_jax.state.train_state import TrainState
from stare_jax.types import Array, PyTree

MAX_NAMES = 3
"""Number of arrays that a message names."""


@jax.jit
def _are_finite(leaves: list[Array]) -> list[Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def arrays_not_finite(tree: PyTree) -> list[str]:
    """Returns the paths of the arrays of a tree that have a value which is not finite."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    named = [(name, leaf) for name, leaf in named if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    are_finite = jax.device_get(_are_finite([leaf for _, leaf in named]))
    return [name for (name, _), is_finite in zip(named, are_finite, strict=True) if not is_finite]


def check_state(phase: str, state: TrainState) -> None:
    """Makes sure that all that a phase trains is finite, with the moments of its optimiser.

    Raises:
        FloatingPointError: names phase, step, arrays and host.
    """
    if found := arrays_not_finite(state.replace(frozen=None)):
        more = f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
        named = f"{', '.join(found[:MAX_NAMES])}{more}"
        raise FloatingPointError(
            f"{phase}: after step {int(state.step)}, on host {platform.node()}: got values in {named} that are not "
            "finite; nothing of it was saved"
        )
