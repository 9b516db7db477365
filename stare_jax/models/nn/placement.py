"""Places of activations on the parameters' mesh: beside gathered weights, or, of few tokens, beside weights at rest.

Weights that are read many times are gathered before the first.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax.sharding.mesh import BATCH_AXES, Rules, path_name
from stare_jax.types import PyTree


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains activations `[B, ...]` to be split by rows over the parameters' mesh, where the mesh divides B.

    Without the constraint the compiler splits activations by width, as it finds weights split, and exchanges
    activations of the whole batch in every layer instead of gathering the layer's weights. A gradient is split only
    where its activation is constrained: the input of a product whose weights are split by input needs it. On one
    device this does nothing.
    """
    return _constrain(x, BATCH_AXES)


class Placement(NamedTuple):
    """Constraints of the activations of a layer, whose first products have weights split by input, the last by output.

    Each takes an array `[B, T, ...]` and returns it.
    """

    read: Callable[[jax.Array], jax.Array]
    """placement of what the first products read, `[B, T, width]`, which is also what the last ones return."""
    sums: Callable[[jax.Array], jax.Array]
    """placement of the results of the first products, heads `[B, T, H, D]` or hidden units `[B, T, M]`."""
    gathered: Callable[[jax.Array], jax.Array]
    """placement of what the last products read, likewise."""


def _leave(x: jax.Array) -> jax.Array:
    return x


MANY_TOKENS = Placement(constrain_batch, _leave, _leave)
"""Each device keeps its rows and gathers the weights of the layer."""
FEW_TOKENS = Placement(
    read=lambda x: _constrain(x, "data", None, "fsdp"),
    # In two steps: rows asked for at once would be computed from gathered weights.
    sums=lambda x: _constrain(_constrain(x, "data", None, "tensor"), BATCH_AXES, None, "tensor"),
    gathered=lambda x: _constrain(x, "data", None, "tensor"),
)
"""Weights stay where they are. Each device multiplies all rows of its `fsdp` group by its part of the weights; the sums
go to the devices of the rows, where attention and activation functions are computed."""


def place_token(x: jax.Array) -> Placement:
    """Returns the placement that exchanges fewer numbers for one token a row, `[B, 1, width]`.

    A layer's weights are `width * n` numbers, its activations `rows * n` with the same n, for the rows of one `fsdp`
    group.
    """
    rows = x.shape[0] // _mesh(x).shape.get("data", 1)
    return FEW_TOKENS if rows < x.shape[-1] else MANY_TOKENS


def gather_weights(params: PyTree, pattern: str, rules: Rules) -> PyTree:
    """Returns parameters of which those that a regex matches are whole on every device of an `fsdp` group.

    Where a loop reads weights that are split, every pass gathers them. An axis over `tensor` stays split.

    Args:
        params: leaves with paths from the root of the model.
        pattern: regex over paths; each that it matches has a rule.
        rules: of the model's parameters.
    """

    def gather(path, leaf):
        name, mesh = path_name(path), _mesh(leaf)
        if mesh.shape.get("fsdp", 1) == 1 or not re.search(pattern, name):
            return leaf
        spec = next(spec for rule, spec in rules if re.search(rule, name))
        if "fsdp" not in spec:
            return leaf
        whole = P(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))

    return jax.tree.map_with_path(gather, params)


def _mesh(x: jax.Array) -> jax.sharding.AbstractMesh:
    return jax.typeof(x).sharding.mesh  # every value knows it, wherever it is traced


def _constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Splits leading axes of `[B, ...]` over axes of the mesh; nothing on one device, or where the mesh cuts a row."""
    mesh = _mesh(x)
    if mesh.size <= 1 or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))
