"""Distances and orientations with finite values and gradients everywhere: safe norms and atan2, no acos.

Vectors are `[..., 3]` in metres unless said otherwise, quaternions unit `[..., 4]` in `wxyz` order.
"""

import chex
import jax.numpy as jnp
import numpy as np

from stare_jax.types import Array

MIN_LENGTH = 1e-6
"""Metres. A shorter vector has no direction, since division by its length would overflow in the gradient."""


def safe_norm(vector: Array) -> Array:
    """Returns the Euclidean norm over the last axis, `[..., D]` -> `[...]`; value and gradient are 0 at 0."""
    chex.assert_type(vector, float)
    square = jnp.sum(jnp.square(vector), axis=-1)
    is_zero = square == 0
    # The square root must not see the zero: its infinite slope would turn the gradient of the outer where into NaN.
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def horizontal(vector: Array) -> Array:
    """Returns the horizontal part, `[..., 3]` -> `[..., 3]` with z = 0."""
    _check_vectors(vector)
    return vector * jnp.array([1.0, 1.0, 0.0], jnp.float32)


def direction(vector: Array) -> Array:
    """Returns the unit vector along `[..., 3]`, or zero where the vector is shorter than a micrometre."""
    _check_vectors(vector)
    length = safe_norm(vector)[..., None]
    is_zero = length < MIN_LENGTH
    return jnp.where(is_zero, 0.0, vector / jnp.where(is_zero, 1.0, length))


def reject(vector: Array, unit: Array) -> Array:
    """Returns the part of `[..., 3]` orthogonal to the unit direction `[..., 3]`; all of it for a zero direction."""
    _check_vectors(vector, unit)
    return vector - jnp.sum(vector * unit, axis=-1, keepdims=True) * unit


def segment_distance(point: Array, start: Array, end: Array) -> Array:
    """Returns the distance of points `[..., 3]` from the segments start -> end, `[...]`."""
    _check_vectors(point, start, end)
    along = end - start
    square = jnp.sum(jnp.square(along), axis=-1)
    is_point = square < MIN_LENGTH**2
    fraction = jnp.sum((point - start) * along, axis=-1) / jnp.where(is_point, 1.0, square)
    fraction = jnp.where(is_point, 0.0, jnp.clip(fraction, 0.0, 1.0))
    return safe_norm(point - start - fraction[..., None] * along)


def polyline_point(fraction: Array, start: Array, corner: Array, end: Array) -> Array:
    """Returns the point of start -> corner -> end, each `[..., 3]`, at a fraction `[...]` in [0, 1] of its length."""
    chex.assert_type(fraction, float)
    _check_vectors(start, corner, end)
    first, second = safe_norm(corner - start)[..., None], safe_norm(end - corner)[..., None]
    gone = fraction[..., None] * (first + second)
    in_first = start + jnp.minimum(gone, first) * direction(corner - start)
    in_second = corner + jnp.maximum(gone - first, 0.0) * direction(end - corner)
    return jnp.where(gone <= first, in_first, in_second)


def rotate_inverse(quat: Array, vector: Array) -> Array:
    """Returns world vectors `[..., 3]` in the frame whose orientation is `quat`, R(quat)^T v."""
    _check_quaternions(quat)
    _check_vectors(vector)
    real, imaginary = quat[..., :1], quat[..., 1:]
    twice = 2.0 * jnp.cross(vector, imaginary)
    return vector + real * twice + jnp.cross(twice, imaginary)


def rotation_angle(quat1: Array, quat2: Array) -> Array:
    """Returns d_rot, the geodesic angle `[...]` in [0, pi] between two orientations, 2 acos|<q1, q2>|.

    It is computed as 2 atan2(|imaginary part|, |real part|) of the relative rotation. Unlike that of acos, this
    gradient is finite at 0 and at pi.
    """
    _check_quaternions(quat1, quat2)
    real1, imaginary1 = quat1[..., :1], quat1[..., 1:]
    real2, imaginary2 = quat2[..., :1], quat2[..., 1:]
    real = jnp.sum(quat1 * quat2, axis=-1)
    imaginary = real1 * imaginary2 - real2 * imaginary1 - jnp.cross(imaginary1, imaginary2)
    return 2.0 * jnp.arctan2(safe_norm(imaginary), jnp.abs(real))


def rotation_alignment(quat1: Array, quat2: Array) -> Array:
    """Returns g(R1, R2) = (1 + cos d_rot) / 2 = <q1, q2>^2, `[...]` in [0, 1]."""
    _check_quaternions(quat1, quat2)
    return jnp.minimum(jnp.square(jnp.sum(quat1 * quat2, axis=-1)), 1.0)


def body_axis(quat: Array, axis: int) -> Array:
    """Returns an axis (0, 1 or 2) of the body frame in the world frame, `[..., 3]`: a column of the rotation matrix.

    The axis of one NumPy quaternion is float64 of NumPy, computed without JAX: simulators and experts ask for it in
    every step.
    """
    is_single = isinstance(quat, np.ndarray) and quat.shape == (4,)
    if not is_single:
        _check_quaternions(quat)
    # Python's numbers are several times faster than NumPy's.
    w, x, y, z = quat.tolist() if is_single else jnp.moveaxis(jnp.asarray(quat), -1, 0)
    columns = (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.array(columns[axis]) if is_single else jnp.stack(columns[axis], axis=-1)


def tilt(quat: Array, up_axis: int) -> Array:
    """Returns the angle `[...]` in [0, pi/2] between a body axis and the vertical line; both ways up are upright."""
    axis = body_axis(quat, up_axis)
    return jnp.arctan2(safe_norm(axis[..., :2]), jnp.abs(axis[..., 2]))


def uprightness(quat: Array, up_axis: int) -> Array:
    """Returns the cosine of `tilt`, `[...]` in [0, 1]."""
    return jnp.minimum(jnp.abs(body_axis(quat, up_axis)[..., 2]), 1.0)


def _check_vectors(*vectors: Array) -> None:
    chex.assert_type(vectors, float)
    chex.assert_shape(vectors, (..., 3))


def _check_quaternions(*quats: Array) -> None:
    chex.assert_type(quats, float)
    chex.assert_shape(quats, (..., 4))
