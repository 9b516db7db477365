"""A gripper in a vertical plane, whose fingers close on an object that is solid to them.

Positions are (x, z), metres, z upwards from the floor. The fingers hold what is between them when they close. Closed
fingers do not enter an object, so that they have to open before they can hold it; open ones straddle it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from stare_jax.types import Array

WORKSPACE = 0.2
CLOSING_SPEED = 0.4
"""Largest change of the opening in a step; 1 is open, 0 is closed."""
HOLDING_OPENING = 0.5
"""Fingers that are closer than this hold the object, or touch each other where there is none."""


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
