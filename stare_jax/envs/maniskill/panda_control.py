"""ManiSkill's `pd_ee_delta_pose` controller of the Panda in a tenth of its time, bit for bit.

ManiSkill computes the drive targets of one robot with some two hundred PyTorch operations on arrays of one to nine
numbers, which costs four times as much as the physics of the step. Here the same float32 operations are done, in the
same order, on NumPy scalars. Where a library decides how to round (sine, cosine, square root, the product of two
matrices, the norm of a vector) the very PyTorch function is called. The inverse kinematics is the controller's own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

ROTATION_ALWAYS_INSIDE = 0.999  # A rotation command shorter than this is not clipped, however its norm is rounded.


def make_drive(agent: Any) -> Callable[[np.ndarray], None] | None:
    """Returns `drive(action)`, equivalent to `agent.set_action`, or None where the robot's controller is another one.

    Args:
        agent: the `mani_skill` agent of a scene with one robot on the CPU; a new one after every reconfiguration.

    Returns:
        `drive` takes a float32 action `[7]` and sets the targets of the nine joint drives.
    """
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
    from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController

    parts = getattr(agent.controller, "controllers", {})
    arm, gripper = parts.get("arm"), parts.get("gripper")
    is_known_kind = type(arm) is PDEEPoseController and type(gripper) is PDJointPosMimicController and len(parts) == 2
    if not (is_known_kind and _is_known(arm, gripper)):
        return None
    drive_arm, drive_gripper = _make_arm_drive(arm), _make_gripper_drive(gripper)

    def drive(action: np.ndarray) -> None:
        drive_arm(action[:6])
        drive_gripper(action[6:])

    return drive


def _is_known(arm: Any, gripper: Any) -> bool:
    """Says whether the settings are those that the functions below spell out."""
    plain = all(
        config.normalize_action and not config.use_target and not config.interpolate
        for config in (arm.config, gripper.config)
    )
    return (
        plain
        and arm.config.use_delta
        and not gripper.config.use_delta
        and arm.config.frame == "root_translation:root_aligned_body_rotation"
        and not arm.kinematics.use_gpu_ik
        and gripper.control_joint_indices.tolist() == [0]
        and gripper.mimic_joint_indices.tolist() == [1]
        and gripper._multiplier.tolist() == [1.0]
        and gripper._offset.tolist() == [0.0]
    )


def _make_scale(low: Any, high: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the map of [-1, 1] to [low, high], two float32 tensors, as the controller rounds it."""
    center, half_range = (0.5 * (high + low)).numpy(), (0.5 * (high - low)).numpy()
    return lambda action: center + half_range * np.clip(action, np.float32(-1), np.float32(1))


def _make_gripper_drive(gripper: Any) -> Callable[[np.ndarray], None]:
    scale = _make_scale(gripper.action_space_low, gripper.action_space_high)
    joints = [joint._objs[0] for joint in gripper.joints]

    def drive(action: np.ndarray) -> None:
        target = scale(action)
        for joint in joints:
            joint.drive_target = target

    return drive


def _make_arm_drive(arm: Any) -> Callable[[np.ndarray], None]:
    import sapien

    kinematics = arm.kinematics
    articulation, ee_link, root_link = arm.articulation._objs[0], arm.ee_link._objs[0], arm.root_link._objs[0]
    joints = [joint._objs[0] for joint in arm.joints]
    own_indices = arm.active_joint_indices.numpy()
    model_indices = kinematics.pmodel_active_joint_indices.numpy()
    result_indices = kinematics.pmodel_controlled_joint_indices.numpy()
    scale_position = _make_scale(arm.action_space_low[:3], arm.action_space_high[:3])
    rotation_scale = np.float32(arm.config.rot_lower)  # the controller's own sign: +1 turns by rot_lower

    def drive(action: np.ndarray) -> None:
        delta_position = scale_position(action[:3])
        delta_rotation = _clip_norm(action[3:]) * rotation_scale
        position, rotation = _pose_at_base(root_link.entity_pose, ee_link.entity_pose)
        target = sapien.Pose(
            position + delta_position,
            _standardize(_multiply(_quaternion_from_euler(delta_rotation), rotation)),
        )
        qpos = articulation.qpos
        result, success, _ = kinematics.pmodel.compute_inverse_kinematics(
            kinematics.end_link_idx,
            target,
            initial_qpos=qpos[model_indices],
            active_qmask=kinematics.qmask,
            max_iterations=100,
        )
        # Where no solution is found the arm holds its present joint positions.
        targets = result[result_indices].astype(np.float32) if success else qpos[own_indices]
        for joint, joint_target in zip(joints, targets, strict=True):
            joint.drive_target = joint_target[None]

    return drive


def _clip_norm(rotation: np.ndarray) -> np.ndarray:
    """Returns the rotation command, shortened to length 1 where it is longer."""
    if float(rotation[0]) ** 2 + float(rotation[1]) ** 2 + float(rotation[2]) ** 2 < ROTATION_ALWAYS_INSIDE**2:
        return rotation
    import torch

    norm = torch.linalg.norm(torch.from_numpy(rotation[None]), axis=1).numpy()[0]
    return rotation * (np.float32(1) / norm) if norm > 1 else rotation


def _pose_at_base(root: Any, ee: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns position `[3]` and quaternion `[4]` of the end-effector link in the frame of the root link."""
    root_p, inverse_q = root.p, root.q
    inverse_q[1:] = -inverse_q[1:]
    ee_p = _rotate(inverse_q, ee.p)
    return _rotate(inverse_q, -root_p) + ee_p, _standardize(_multiply(inverse_q, ee.q))


def _rotate(quaternion: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Rotates a point as the sandwich product q p q*, which is how ManiSkill rounds it."""
    conjugate = quaternion * np.array([1, -1, -1, -1], np.float32)
    pure = np.concatenate([np.zeros(1, np.float32), point])
    return _multiply(_multiply(quaternion, pure), conjugate)[1:]


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamilton product of two quaternions, wxyz."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return np.array(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )


def _standardize(quaternion: np.ndarray) -> np.ndarray:
    return -quaternion if quaternion[0] < 0 else quaternion


def _quaternion_from_euler(angles: np.ndarray) -> np.ndarray:
    """Returns the quaternion of intrinsic rotations about x, then y, then z by `angles` `[3]`."""
    import torch

    # One angle a call, as ManiSkill does: some vector libraries round three at a time otherwise than one alone.
    each = torch.from_numpy(angles[None]).unbind(-1)
    (cx, cy, cz), (sx, sy, sz) = ([function(angle).item() for angle in each] for function in (torch.cos, torch.sin))
    about_x = torch.tensor([[[1, 0, 0], [0, cx, -sx], [0, sx, cx]]], dtype=torch.float32)
    about_y = torch.tensor([[[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]], dtype=torch.float32)
    about_z = torch.tensor([[[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]], dtype=torch.float32)
    return _quaternion_from_matrix(torch.matmul(torch.matmul(about_x, about_y), about_z).numpy()[0])


def _sqrt_of_positive(x: np.ndarray) -> np.ndarray:
    """Returns the square root, 0 of what is negative. On some processors PyTorch's is not correctly rounded."""
    import torch

    result = np.zeros_like(x)
    result[x > 0] = torch.sqrt(torch.from_numpy(x[x > 0])).numpy()
    return result


def _quaternion_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Returns the quaternion with non-negative real part, by the best conditioned of the four formulas."""
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = matrix
    one = np.float32(1)
    squares = np.array([one + m00 + m11 + m22, one + m00 - m11 - m22, one - m00 + m11 - m22, one - m00 - m11 + m22])
    scales = _sqrt_of_positive(squares)
    best = int(np.argmax(scales))
    square = scales[best] * scales[best]
    rows = (
        (square, m21 - m12, m02 - m20, m10 - m01),
        (m21 - m12, square, m10 + m01, m02 + m20),
        (m02 - m20, m10 + m01, square, m12 + m21),
        (m10 - m01, m20 + m02, m21 + m12, square),
    )
    return _standardize(np.array(rows[best]) / (np.float32(2) * np.maximum(scales[best], np.float32(0.1))))
