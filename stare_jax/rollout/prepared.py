"""Parameters prepared for a rollout (`Policy.prepare`): in memory anew is only what differs."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from stare_jax.models.policy import Policy
from stare_jax.types import PyTree


class _Layout(NamedTuple):
    """Structure of prepared parameters."""

    tree: jax.tree_util.PyTreeDef
    sources: tuple[int | None, ...]
    """number of the given leaf that each leaf is; None where it is computed."""


def prepare_params(policy: Policy, params: PyTree) -> PyTree:
    """Returns parameters as `policy.sample` reads them fastest; prepared ones as they are.

    A compiled function copies what it passes through. Here such leaves are the given arrays themselves, and the result
    can be used for as long as these.
    """
    layout = _layout(policy.prepare, params)
    changed = {} if None not in layout.sources else jit_changes(policy.prepare)(params)
    return _join(layout, params, changed)


def prepared_shapes(policy: Policy, params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what `prepare_params` returns, and the part of it that is in memory anew, as shapes with shardings.

    Args:
        policy: the policy.
        params: `jax.ShapeDtypeStruct`s on devices that need not be there.
    """
    layout, changed = _layout(policy.prepare, params), {}
    if None in layout.sources:
        lowered = jit_changes(policy.prepare).lower(params)
        changed = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            lowered.out_info,
            lowered.compile().output_shardings,
        )
    return _join(layout, params, changed), changed


@functools.lru_cache(maxsize=16)
def jit_changes(prepare: Callable) -> Callable:
    """Compiles the part of a preparation that computes anything: params -> leaves by their number among all."""

    @jax.jit
    def changes(params):
        given = set(map(id, jax.tree.leaves(params)))
        return {i: leaf for i, leaf in enumerate(jax.tree.leaves(prepare(params))) if id(leaf) not in given}

    return changes


def _layout(prepare: Callable, params: PyTree) -> _Layout:
    leaves, tree = jax.tree.flatten(params)
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    named = [one if isinstance(one, NamedSharding) else None for one in shardings]
    kinds = tuple((leaf.shape, leaf.dtype, one) for leaf, one in zip(leaves, named, strict=True))
    return _trace(prepare, tree, kinds)


@functools.lru_cache(maxsize=16)
def _trace(prepare: Callable, tree: jax.tree_util.PyTreeDef, kinds: tuple) -> _Layout:
    """Returns the layout for leaves of these shapes, types and shardings; what is prepared may depend on the mesh."""
    found = []

    def record(params):
        given = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
        leaves, prepared = jax.tree.flatten(prepare(params))
        found.append(_Layout(prepared, tuple(given.get(id(leaf)) for leaf in leaves)))
        return leaves

    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in kinds]
    jax.eval_shape(record, jax.tree.unflatten(tree, shapes))
    return found[0]


def _join(layout: _Layout, params: PyTree, changed: dict[int, PyTree]) -> PyTree:
    given = jax.tree.leaves(params)
    leaves = [changed[i] if source is None else given[source] for i, source in enumerate(layout.sources)]
    return jax.tree.unflatten(layout.tree, leaves)
