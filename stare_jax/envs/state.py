"""The part of a simulator's state that policies see besides images, computed from `Signals` alone."""

from typing import Literal

from stare_jax.stages.geometry import body_axis
from stare_jax.types import Array, Signals

STATE_DIMS = {"none": 0, "tcp": 3, "low_dim": 29}
StateName = Literal[*STATE_DIMS]


def observed_state(use_state: str, signals: Signals, gripper_opening: float | Array) -> Array:
    """Returns the state `[S]` of one environment that a policy sees, in the namespace of the signals' arrays.

    Args:
        use_state: as in `EnvConfig`.
        signals: of the environment.
        gripper_opening: distance between the fingers, in metres.
    """
    if use_state == "low_dim":
        return low_dim_state(signals, gripper_opening)
    return signals.tcp_pos[: STATE_DIMS[use_state]]  # all of it, or nothing


def low_dim_state(signals: Signals, gripper_opening: float | Array) -> Array:
    """Returns float32 `[29]`: tool (position, orientation), gripper opening, object (position, orientation), goal
    position, tool to grasp point, object to goal, is_grasped. Metres; an orientation is the first two columns of its
    rotation matrix.
    """
    xp = signals.tcp_pos.__array_namespace__()
    parts = (
        signals.tcp_pos,
        _first_columns(signals.tcp_quat),
        xp.array([gripper_opening]),
        signals.obj_pos,
        _first_columns(signals.obj_quat),
        signals.goal_pos,
        signals.grasp_pos - signals.tcp_pos,
        signals.goal_pos - signals.obj_pos,
        xp.array([signals.is_grasped]),
    )
    return xp.concatenate(parts, dtype=xp.float32)


def _first_columns(quat: Array) -> Array:
    """Returns `[6]`, the first two columns of the rotation matrix, which move smoothly with the orientation.

    A quaternion does not: its sign flips somewhere, and with w >= 0 it flips where tools point down.
    """
    return quat.__array_namespace__().concatenate([body_axis(quat, 0), body_axis(quat, 1)])
