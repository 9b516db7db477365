"""Contexts of decisions (`Policy.encode`) that are kept on the devices: their shapes, their layout, their rows."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh

from stare_jax.logging import say
from stare_jax.models.policy import ActionScore, Policy
from stare_jax.sharding.mesh import batch_sharding, num_parts
from stare_jax.state.storage import num_bytes
from stare_jax.types import Array, PyTree


def context_shapes(policy: Policy, num_decisions: int, size: int, context_gb: float) -> PyTree | None:
    """Returns the contexts of an iteration as shapes `[R, ...]`; None, and says so, where it cannot keep them.

    Args:
        policy: which may have `encode`.
        num_decisions: of an iteration, at most.
        size: rows that are encoded at a time, of which R is a multiple.
        context_gb: memory for all of them; 0 asks for none.
    """
    if not context_gb:
        return None
    if policy.encode is None:
        say(f"ppo: ppo.context_gb = {context_gb:g} is not used: this policy has no context, or trains what makes it")
        return None
    params = jax.eval_shape(policy.init, jax.random.key(0))
    shapes = jax.eval_shape(policy.encode, params, policy.observation_shape(-(-num_decisions // size) * size))
    if (needed := num_bytes(shapes) / 1e9) > context_gb:
        got = f"got {context_gb:g}, expected {needed:.3g} for {num_decisions} decisions"
        say(f"ppo: ppo.context_gb: {got}; contexts are computed in every epoch")
        return None
    return shapes


def lay_out(shapes: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns `context_shapes` as `[P, R / P, ...]`, each of the P parts of a mesh's batches with rows of its own."""
    parts, sharding = num_parts(mesh), batch_sharding(mesh)

    def one(x):
        return jax.ShapeDtypeStruct((parts, x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes)


def score_rows(policy: Policy, contexts: PyTree | None, row: Array | None) -> Callable[..., ActionScore]:
    """Returns `policy.log_prob` of decisions whose contexts are kept; as it is where none are.

    For the decisions of one pass: the contexts of a whole batch would be in memory twice.

    Args:
        policy: scores them.
        contexts: leaves `[P, R / P, ...]`, see `lay_out`; or None.
        row: int32 `[B]`, of each decision the row in its part; the B decisions are those of P parts in turn, of each as
            many.
    """
    if contexts is None:
        return policy.log_prob

    def take(x):
        # Each part takes rows of its own, so that nothing leaves its device.
        taken = jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(x, row.reshape(len(x), -1))
        return taken.reshape(-1, *x.shape[2:])

    return functools.partial(policy.log_prob, context=jax.tree.map(take, contexts))
