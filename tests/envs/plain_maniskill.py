"""ManiSkill's own account of an environment that it made and stepped, to compare with."""

import numpy as np
import torch

from stare_jax.envs.maniskill.scenes import SCENES


def physics_of(env):
    """All that the physics engine knows of the robot and its objects, as one vector."""
    unwrapped = env.unwrapped
    robot = unwrapped.agent.robot._objs[0]
    obj, base = SCENES[unwrapped.spec.id].objects(unwrapped)
    poses = [part for actor in (obj, base) for part in (actor._objs[0].pose.p, actor._objs[0].pose.q)]
    velocities = [obj._bodies[0].linear_velocity, obj._bodies[0].angular_velocity]
    targets = [joint.drive_target for joint in robot.active_joints]
    return np.concatenate([robot.qpos, robot.qvel, *poses, *velocities, *targets])


class Touches:
    """Asks at every sub-step of the environment from now on what the robot's links press on the object with."""

    def __init__(self, env):
        self._env = env.unwrapped
        self._obj, _ = SCENES[self._env.spec.id].objects(self._env)
        self._env._after_simulation_step = self._look
        self._run = self._longest = 0

    def _look(self):
        links = [link for link in self._env.agent.robot.links if link._bodies[0].collision_shapes]
        forces = [self._env.scene.get_pairwise_contact_forces(link, self._obj) for link in links]
        self._run = self._run + 1 if torch.linalg.norm(torch.cat(forces), dim=-1).max() > 1e-2 else 0
        self._longest = max(self._longest, self._run)

    def longest(self):
        """Returns the number of sub-steps of the longest one since the last call; 0 where there has been none."""
        longest, self._longest, self._run = self._longest, 0, 0
        return longest


def assert_signals_are_those_of_torch(signals, touches, env, info):
    unwrapped = env.unwrapped
    obj, _ = SCENES[unwrapped.spec.id].objects(unwrapped)
    agent, tool = unwrapped.agent, SCENES[unwrapped.spec.id].tool(unwrapped)
    np.testing.assert_array_equal(np.append(signals.tcp_pos, signals.tcp_quat), tool.pose.raw_pose[0].numpy())
    np.testing.assert_array_equal(np.append(signals.obj_pos, signals.obj_quat), obj.pose.raw_pose[0].numpy())
    assert signals.is_grasped == bool(agent.is_grasping(obj)[0])
    assert signals.success == bool(info["success"][0])
    num_touching = touches.longest()
    assert num_touching if signals.is_contact else num_touching < SCENES[unwrapped.spec.id].contact_every
