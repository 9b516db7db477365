"""Pictures of the toys: discs and boxes on a plane, drawn in pure JAX on any device, without a graphics driver."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stare_jax.types import Array

BACKGROUND = (0.92, 0.92, 0.90)
GOAL = (0.45, 0.75, 0.45)
OBJECT = (0.80, 0.22, 0.18)
GRIPPER = (0.15, 0.25, 0.55)


class Shape(NamedTuple):
    """A disc or a box, filled with one colour. Metres."""

    centre: Array
    """float32 `[2]`."""
    half_size: Array
    """float32 `[2]`, half the width and half the height; of a disc the radius, twice."""
    angle: Array
    """float32, radians that a box is turned by, counter-clockwise."""
    is_disc: Array
    """bool."""
    colour: Array
    """float32 `[3]`, red, green and blue in [0, 1]."""


class View(NamedTuple):
    """The part of the plane that a picture shows: a square, its second axis upwards. Metres."""

    left: float
    bottom: float
    side: float


def disc(centre: Array, radius: Array | float, colour: Sequence[float]) -> Shape:
    """Returns a disc about a centre `[2]`."""
    size = jnp.full(2, radius, jnp.float32)
    return Shape(jnp.asarray(centre), size, jnp.float32(0.0), jnp.array(True), jnp.array(colour, jnp.float32))


def box(
    centre: Array, half_width: Array | float, half_height: Array | float, colour: Sequence[float], angle: Array = 0.0
) -> Shape:
    """Returns a box about a centre `[2]`, turned by an angle in radians."""
    size = jnp.stack([jnp.float32(half_width), jnp.float32(half_height)])
    return Shape(jnp.asarray(centre), size, jnp.float32(angle), jnp.array(False), jnp.array(colour, jnp.float32))


def draw(shapes: Sequence[Shape], view: View, height: int, width: int) -> Array:
    """Returns a picture uint8 `[height, width, 3]` of shapes, the later ones over the earlier.

    Edges are a pixel wide and smooth, so that a motion of less than a pixel is seen.

    Args:
        shapes: at least one.
        view: the part of the plane that is shown.
        height: pixels.
        width: pixels.
    """
    x = view.left + view.side * (jnp.arange(width) + 0.5) / width
    y = view.bottom + view.side * (height - 0.5 - jnp.arange(height)) / height
    points = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1).astype(jnp.float32)
    pixel = view.side / max(height, width)

    def paint(picture: Array, shape: Shape) -> tuple[Array, None]:
        covered = jnp.clip(0.5 - _distance(points, shape) / pixel, 0.0, 1.0)[..., None]
        return picture + covered * (shape.colour - picture), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shapes)
    empty = jnp.broadcast_to(jnp.array(BACKGROUND, jnp.float32), (height, width, 3))
    picture, _ = jax.lax.scan(paint, empty, stacked)
    return jnp.round(255.0 * picture).astype(jnp.uint8)


def _distance(points: Array, shape: Shape) -> Array:
    """Returns the distances `[..., ]` of points `[..., 2]` to a shape's edge, negative inside; of a box that along the
    axis in which it is the larger."""
    offset = points - shape.centre
    cos, sin = jnp.cos(shape.angle), jnp.sin(shape.angle)
    turned = jnp.stack([cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]], -1)
    to_box = jnp.max(jnp.abs(turned) - shape.half_size, axis=-1)
    return jnp.where(shape.is_disc, jnp.linalg.norm(offset, axis=-1) - shape.half_size[0], to_box)
