import numpy as np

from stare_jax.envs.maniskill.scenes import SCENES, Start
from stare_jax.envs.rotations import about_axis, euler_xyz, rotation_matrix, rotation_vector
from stare_jax.stages import TASKS
from stare_jax.stages.geometry import body_axis

HALF = np.sqrt(0.5)


def test_body_axes_of_a_quarter_turn():
    about_z = np.array([HALF, 0, 0, HALF])  # x -> y, y -> -x
    np.testing.assert_allclose(body_axis(about_z, 0), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(body_axis(about_z, 1), [-1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(body_axis(about_z, 2), [0, 0, 1], atol=1e-12)


def test_peg_is_reached_at_the_nearest_point_of_its_axis():
    grasp_point = SCENES["LiftPegUpright-v1"].grasp_point
    along_y = np.array([HALF, 0, 0, HALF], np.float32)
    peg = np.array([0.1, 0.2, 0.025], np.float32)
    beside = grasp_point(peg, along_y, np.array([0.3, 0.25, 0.2], np.float32))
    np.testing.assert_allclose(beside, [0.1, 0.25, 0.025], atol=1e-6)
    # The axis ends 12 cm from the centre.
    past_the_end = grasp_point(peg, along_y, np.array([0.1, 0.9, 0.2], np.float32))
    np.testing.assert_allclose(past_the_end, [0.1, 0.32, 0.025], atol=1e-6)


def test_upright_goal_tips_the_peg_the_short_way():
    yaw = 0.7
    lying = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)], np.float32)
    pos, quat = SCENES["LiftPegUpright-v1"].goal(Start(np.array([0.1, 0.2, 0.025], np.float32), lying, 0.0), None)
    np.testing.assert_allclose(pos, [0.1, 0.2, 0.12], atol=1e-6)
    np.testing.assert_allclose(body_axis(quat, 0), [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(abs(quat @ lying), np.cos(np.pi / 4), atol=1e-6)  # a turn by 90 degrees


def test_every_task_has_a_row_and_a_default_control_mode_with_seven_dimensions():
    assert set(SCENES) == set(TASKS)
    for scene in SCENES.values():
        assert scene.action_dims[next(iter(scene.action_dims))] == len(scene.action_scale) == 7


def test_rotations_go_back_and_forth():
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector = rng.uniform(-1.5, 1.5, 3)
        matrix = about_axis(vector)
        np.testing.assert_allclose(rotation_vector(matrix), vector, atol=1e-9)
        x, y, z = euler_xyz(matrix)
        steps = [about_axis(np.eye(3)[axis] * angle) for axis, angle in enumerate((x, y, z))]
        np.testing.assert_allclose(steps[0] @ steps[1] @ steps[2], matrix, atol=1e-9)
        half = np.linalg.norm(vector) / 2
        quat = np.append(np.cos(half), np.sin(half) * vector / np.linalg.norm(vector))
        np.testing.assert_allclose(rotation_matrix(quat), matrix, atol=1e-9)
