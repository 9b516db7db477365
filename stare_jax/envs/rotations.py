"""Rotations of single bodies, for experts and signals: NumPy, float64, quaternions `wxyz`."""

import numpy as np

from stare_jax.stages.geometry import body_axis


def rotation_matrix(quat: np.ndarray) -> np.ndarray:
    """Returns the matrix `[3, 3]` whose columns are the body's axes."""
    return np.stack([body_axis(quat, index) for index in range(3)], axis=1)


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Returns axis times angle `[3]` of a rotation matrix, for angles below pi."""
    angle = np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1.0, 1.0))
    if angle < 1e-6:
        return np.zeros(3)
    antisymmetric = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    return antisymmetric * angle / (2 * np.sin(angle) + 1e-12)


def about_axis(vector: np.ndarray) -> np.ndarray:
    """Returns the matrix `[3, 3]` of a rotation by the length of a vector about its direction (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def euler_xyz(matrix: np.ndarray) -> np.ndarray:
    """Returns the angles `[3]` of intrinsic rotations about x, then y, then z, for |y| below a right angle."""
    return np.array(
        [
            np.arctan2(-matrix[1, 2], matrix[2, 2]),
            np.arcsin(np.clip(matrix[0, 2], -1.0, 1.0)),
            np.arctan2(-matrix[0, 1], matrix[0, 0]),
        ]
    )


def turned_about_z(quat: np.ndarray, angle: float) -> np.ndarray:
    """Returns the quaternion `[4]` of an orientation turned about the vertical of the world."""
    cosine, sine = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = quat
    return np.array([cosine * w - sine * z, cosine * x - sine * y, cosine * y + sine * x, cosine * z + sine * w])
