"""Places of activations on the parameters' mesh: rows beside gathered weights, or few tokens beside weights at rest."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax.sharding.mesh import BATCH_AXES


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains activations `[B, ...]` to be split by rows over the parameters' mesh, where the mesh divides B.

    Without the constraint the compiler splits activations by width, as it finds weights split, and exchanges
    activations of the whole batch in every layer instead of gathering the layer's weights. A gradient is split only
    where its activation is constrained: the input of a product whose weights are split by input needs it. On one
    device this does nothing.
    """
    return _constrain(x, BATCH_AXES)


class Layout(NamedTuple):
    """Constraints of the activations of a layer whose first products have weights split by input, its last by output."""

    read: Callable[[jax.Array], jax.Array]
    """of the layer's input and output `[B, ..., width]`, which the first products read."""
    sums: Callable[[jax.Array], jax.Array]
    """of the first products' results `[B, T, units, ...]`: heads, or hidden units."""
    gathered: Callable[[jax.Array], jax.Array]
    """of the last products' inputs `[B, T, units, ...]`."""


def _unconstrained(x: jax.Array) -> jax.Array:
    return x


OF_MANY_TOKENS = Layout(constrain_batch, _unconstrained, _unconstrained)
"""Each device has rows of its own and gathers the weights of the layer."""
OF_FEW_TOKENS = Layout(
    read=lambda x: _constrain(x, "data", None, "fsdp"),
    # As one constraint it would be met by gathering the weights: the sum is taken first, and then cut.
    sums=lambda x: _constrain(_constrain(x, "data", None, "tensor"), BATCH_AXES, None, "tensor"),
    gathered=lambda x: _constrain(x, "data", None, "tensor"),
)
"""Each device multiplies all rows of its `fsdp` group by the part of the weights that it has. Partial sums are
exchanged, of each row to the device that has it; between the products, in attention for one, rows are where they were."""


def layout_of_token(x: jax.Array) -> Layout:
    """Returns the layout that exchanges less for one token a row, `[B, width]` or `[B, 1, width]`.

    In a layer, devices exchange either `width * n` numbers of weights or about `rows * n` of activations, with the same
    n and the rows of one `fsdp` group.
    """
    rows = x.shape[0] // _mesh(x).shape.get("data", 1)
    return OF_FEW_TOKENS if rows < x.shape[-1] else OF_MANY_TOKENS


def _mesh(x: jax.Array) -> jax.sharding.AbstractMesh:
    return jax.typeof(x).sharding.mesh  # every value knows it, wherever it is traced


def _constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Splits leading axes of `[B, ...]` over axes of the mesh; nothing on one device, or where the mesh cuts a row."""
    mesh = _mesh(x)
    if mesh.size <= 1 or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))
