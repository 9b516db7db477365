"""What ManiSkill itself says of an environment that it made and stepped, to compare with."""

import numpy as np
import torch

from stare_jax.envs.scenes import SCENES


def physics_of(env):
    """All that the physics engine knows of the robot and its objects, as one vector."""
    unwrapped = env.unwrapped
    robot = unwrapped.agent.robot._objs[0]
    obj, base = SCENES[unwrapped.spec.id].objects(unwrapped)
    poses = [part for actor in (obj, base) for part in (actor._objs[0].pose.p, actor._objs[0].pose.q)]
    velocities = [obj._bodies[0].linear_velocity, obj._bodies[0].angular_velocity]
    targets = [joint.drive_target for joint in robot.active_joints]
    return np.concatenate([robot.qpos, robot.qvel, *poses, *velocities, *targets])


def assert_signals_are_those_of_torch(signals, previous, env, info):
    unwrapped = env.unwrapped
    obj, _ = SCENES[unwrapped.spec.id].objects(unwrapped)
    agent, tool = unwrapped.agent, SCENES[unwrapped.spec.id].tool(unwrapped)
    np.testing.assert_array_equal(np.append(signals.tcp_pos, signals.tcp_quat), tool.pose.raw_pose[0].numpy())
    np.testing.assert_array_equal(np.append(signals.obj_pos, signals.obj_quat), obj.pose.raw_pose[0].numpy())
    assert signals.is_grasped == bool(agent.is_grasping(obj)[0])
    assert signals.success == bool(info["success"][0])
    force = sum(torch.linalg.norm(unwrapped.scene.get_pairwise_contact_forces(link, obj)) for link in agent.robot.links)
    moved = np.linalg.norm(signals.obj_pos - previous.obj_pos) > 2e-3
    is_near = np.linalg.norm(signals.grasp_pos - signals.tcp_pos) < 0.05
    assert signals.is_contact == (float(force) > 1e-2 or (moved and is_near))
