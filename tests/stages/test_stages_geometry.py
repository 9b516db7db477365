"""Geometry against scipy-free closed forms, and gradients where they are usually infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_signals import make_signals

from stare_jax.stages import geometry, measures


def about(axis: int, angle: float) -> np.ndarray:
    """Quaternion of a rotation by `angle` about a coordinate axis."""
    quat = np.zeros(4, np.float32)
    quat[0], quat[1 + axis] = np.cos(angle / 2), np.sin(angle / 2)
    return quat


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, np.pi / 2, 3.0, np.pi])
@pytest.mark.parametrize("sign", [1.0, -1.0])  # q and -q are one rotation.
def test_rotation_angle(angle, sign):
    base = geometry_product(about(2, 0.7), about(0, -0.4))
    other = sign * geometry_product(base, about(1, angle))
    assert geometry.rotation_angle(base, other) == pytest.approx(angle, abs=1e-6)
    # g = (1 + cos d_rot) / 2 = <q1, q2>^2
    assert geometry.rotation_alignment(base, other) == pytest.approx((1 + np.cos(angle)) / 2, abs=1e-6)
    for argument in (0, 1):
        gradient = jax.grad(geometry.rotation_angle, argnums=argument)(jnp.array(base), jnp.array(other))
        assert np.isfinite(gradient).all()


def geometry_product(q1, q2):
    """Hamilton product."""
    w1, v1, w2, v2 = q1[0], q1[1:], q2[0], q2[1:]
    return np.append(w1 * w2 - v1 @ v2, w1 * v2 + w2 * v1 + np.cross(v1, v2)).astype(np.float32)


def test_rotation_matrix_and_its_inverse():
    # A quarter turn about z takes x to y, so in the turned frame the world's y axis is the x axis.
    quarter = about(2, np.pi / 2)
    np.testing.assert_allclose(geometry.body_axis(quarter, 0), [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(geometry.rotate_inverse(quarter, np.float32([0, 1, 0])), [1, 0, 0], atol=1e-6)
    quat = geometry_product(geometry_product(about(0, 0.5), about(1, -1.1)), about(2, 2.0))
    vector = np.float32([0.3, -0.2, 0.9])
    matrix = np.stack([geometry.body_axis(quat, axis) for axis in range(3)], axis=1)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(geometry.rotate_inverse(quat, vector), matrix.T @ vector, atol=1e-6)


@pytest.mark.parametrize("angle, expected", [(0.0, 90.0), (30.0, 60.0), (-90.0, 0.0), (90.0, 0.0), (120.0, 30.0)])
def test_tilt(angle, expected):
    # Turning by a about y takes the x axis to (cos a, 0, -sin a): it leaves the vertical line by 90 - |a| degrees, and
    # pointing down is as upright as pointing up.
    quat = jnp.array(about(1, np.radians(angle)))
    assert geometry.tilt(quat, 0) == pytest.approx(np.radians(expected), abs=1e-6)
    assert geometry.uprightness(quat, 0) == pytest.approx(np.cos(np.radians(expected)), abs=1e-6)
    for function in (geometry.tilt, geometry.uprightness):
        assert np.isfinite(jax.grad(function)(quat, 0)).all()


def test_segment_distance_and_polyline_point():
    # On the segment from (0,0,0) to (2,0,0): beside it, before it, after it; a segment without length is a point.
    points = np.float32([[1, 3, 0], [-3, 4, 0], [5, 0, 4]])
    start, end = np.zeros(3, np.float32), np.float32([2, 0, 0])
    np.testing.assert_allclose(geometry.segment_distance(points, start, end), [3, 5, 5], atol=1e-6)
    np.testing.assert_allclose(geometry.segment_distance(points[1], start, start), 5, atol=1e-6)
    # (0,0,0) -> (2,0,0) -> (2,0,-1) is 3 long: thirds are (1,0,0), the corner, and the end.
    fractions = np.float32([0, 1 / 3, 2 / 3, 5 / 6, 1])
    expected = [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, -0.5], [2, 0, -1]]
    corner, last = np.float32([2, 0, 0]), np.float32([2, 0, -1])
    spread = [np.broadcast_to(point, (5, 3)) for point in (start, corner, last)]
    np.testing.assert_allclose(geometry.polyline_point(fractions, *spread), expected, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-10, 1e-6, 1.0])
def test_gradients_of_small_vectors_are_finite(size):
    vector = size * jnp.array([1.0, -2.0, 0.5])
    unit = jnp.array([1.0, 0.0, 0.0])

    def total(v):
        lengths = geometry.safe_norm(v) + geometry.safe_norm(geometry.reject(unit, geometry.direction(v)))
        return (
            lengths + geometry.segment_distance(unit, v, 2 * v) + geometry.polyline_point(v[0], v, 2 * v, 3 * v).sum()
        )

    assert np.isfinite(total(vector)) and np.isfinite(jax.grad(total)(vector)).all()
    if size == 0:
        assert geometry.safe_norm(vector) == 0 and not jax.grad(geometry.safe_norm)(vector).any()


def test_consecutive_grasp_and_slip():
    held = [True, True, False, True, True, True, False]
    # In the hand, the object moves by 4 mm (within the tolerance of 5), and by 6 mm between t = 4 and 5.
    along = np.array([0.0, 0.004, 0.1, 0.2, 0.2, 0.206, 0.206])
    signals = make_signals(7, is_grasped=held, obj_pos=along[:, None] * [0, 0, 1])
    np.testing.assert_array_equal(measures.consecutive_grasp(signals), [1, 2, 0, 1, 2, 3, 0])
    # t = 2 and 6: held before, open now. t = 3: closes, which is no slip, however far the object came.
    expected = [False, False, True, False, False, True, True]
    np.testing.assert_array_equal(measures.slip(signals, slip_tol=0.005), expected)


def test_slip_is_measured_in_the_end_effector_frame():
    # Hand and object turn together about the hand's axis: the object travels 14 cm in the world, none in the hand.
    quarter = np.stack([about(2, 0.0), about(2, np.pi / 2)])
    together = make_signals(2, is_grasped=True, tcp_quat=quarter, obj_pos=[[0.1, 0, 0], [0, 0.1, 0]])
    assert not measures.slip(together, slip_tol=0.005).any()
    # The hand turns and the object stays behind.
    alone = make_signals(2, is_grasped=True, tcp_quat=quarter, obj_pos=[0.1, 0, 0])
    np.testing.assert_array_equal(measures.slip(alone, slip_tol=0.005), [False, True])
