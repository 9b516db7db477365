"""A gripper in a vertical plane, whose fingers close on an object that is solid to them.

Positions are (x, z), metres, z upwards from the floor. The fingers hold what is between them when they close. Closed
fingers do not enter an object, so that they have to open before they can hold it; open ones straddle it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from stare_jax.envs.toys.drawing import GRIPPER, Shape, View, box
from stare_jax.types import Array

WORKSPACE = 0.2
CLOSING_SPEED = 0.4
"""Largest change of the opening in a step; 1 is open, 0 is closed."""
HOLDING_OPENING = 0.5
"""Fingers that are closer than this hold the object, or touch each other where there is none."""
MAX_OPENING = 0.04
"""Metres between open fingers, as they are seen and as states tell; motions do not depend on it."""
VIEW = View(left=-0.16, bottom=-0.06, side=0.3)
"""The part of the plane that pictures show, of which the floor is the lower fifth."""
FLOOR = (0.72, 0.68, 0.62)


class Gripper(NamedTuple):
    """State of the gripper."""

    position: Array
    """float32 `[2]`."""
    opening: Array
    """float32 in [0, 1]; below `HOLDING_OPENING` the fingers squeeze."""
    is_holding: Array
    """bool."""


def move_gripper(position: Array, displacement: Array) -> Array:
    """Returns the position `[2]` after a displacement `[2]`, within the workspace and above the floor."""
    low = jnp.array([-WORKSPACE, 0.0], jnp.float32)
    return jnp.clip(position + displacement, low, WORKSPACE)


def move_fingers(opening: Array, action: Array) -> Array:
    """Returns the opening after an action in [-1, 1]: 1 opens and -1 closes at full speed."""
    return jnp.clip(opening + CLOSING_SPEED * action, 0.0, 1.0)


def approach(gripper: Gripper, displacement: Array, opening: Array, *, is_inside) -> Gripper:
    """Moves a gripper that holds nothing, and closes or opens it.

    Args:
        gripper: before the step; it holds nothing.
        displacement: `[2]`.
        opening: after the step.
        is_inside: (position `[2]`) -> bool, whether the object is between the fingers there.
    """
    was_closed, is_closed = gripper.opening < HOLDING_OPENING, opening < HOLDING_OPENING
    position = move_gripper(gripper.position, displacement)
    position = jnp.where(was_closed & is_inside(position), gripper.position, position)
    return Gripper(position, opening, is_closed & ~was_closed & is_inside(position))


def finger_opening(gripper: Gripper) -> Array:
    """Returns the distance between the fingers in metres."""
    return MAX_OPENING * gripper.opening


def floor_shape() -> Shape:
    """Returns everything below the floor."""
    return box(jnp.array([0.0, -WORKSPACE], jnp.float32), 2 * WORKSPACE, WORKSPACE, FLOOR)


def gripper_shapes(gripper: Gripper) -> tuple[Shape, ...]:
    """Returns two fingers and the palm above them."""
    reach = 0.5 * finger_opening(gripper) + 0.004
    x, z = gripper.position
    fingers = tuple(box(jnp.stack([x + side * reach, z + 0.006]), 0.004, 0.014, GRIPPER) for side in (-1.0, 1.0))
    return (box(jnp.stack([x, z + 0.026]), 0.5 * MAX_OPENING + 0.008, 0.006, GRIPPER), *fingers)
