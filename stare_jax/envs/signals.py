"""What the CPU simulator says of a task's state, as `Signals`.

Everything is read from SAPIEN itself and computed in NumPy: on arrays of three numbers PyTorch costs more than the
physics of the step.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stare_jax.envs.rotations import body_axis
from stare_jax.envs.scenes import Scene, Start
from stare_jax.types import Signals

CONTACT_DISPLACEMENT = 2e-3  # m: an object that moved further in one control step has been touched in between,
CONTACT_REACH = 0.05  # m: if the tool is that close to it. Further away, carrots roll and spoons rock by themselves.
CONTACT_FORCE = 1e-2  # N, at the end of the control step.
GRASP_FORCE = 0.5  # N on each finger, and the angle below: the simulator's own definition of a grasp.
GRASP_ANGLE = np.deg2rad(85)


class SignalReader:
    """Reads the `Signals` of one built scene; a reconfigured scene needs a new one."""

    def __init__(self, env: Any, scene: Scene):
        """
        Args:
            env: the unwrapped `mani_skill` environment.
            scene: its row of the table.
        """
        obj, base = scene.objects(env)
        agent = env.agent
        self._env, self._scene, self._px, self._timestep = env, scene, env.scene.px, env.scene.px.timestep
        self._tcp = scene.tool(env)._objs[0]
        self._obj, self._obj_body, self._base = obj._objs[0], obj._bodies[0], base._objs[0]
        self._fingers = (agent.finger1_link._objs[0], agent.finger2_link._objs[0])
        self._articulation = agent.robot._objs[0]
        self._on_top = scene.on_top(env)
        self._links = frozenset(link._objs[0] for link in agent.robot.links)

    def gripper_opening(self) -> float:
        """Returns the distance between the fingers, in metres."""
        return float(self._articulation.qpos[-2:].sum())

    def begin(self) -> Signals:
        """Returns the signals of an episode's first state, right after a reset."""
        pose = self._obj.pose
        self._start = Start(pose.p, pose.q, self._on_top(pose.q, self._base.pose.q))
        # The contacts that the simulator still lists are those of the episode before.
        return self._read(is_grasped=False, is_contact=False)

    def read(self) -> Signals:
        """Returns the signals of the state after a control step."""
        forces = self._forces_on_links()
        touched = any(np.linalg.norm(force) > CONTACT_FORCE for force in forces.values())
        return self._read(
            is_grasped=self._is_grasped(forces),
            is_contact=touched or self._is_shifted(),
        )

    def _read(self, *, is_grasped: bool, is_contact: bool) -> Signals:
        tcp, obj = self._tcp.entity_pose, self._obj.pose
        tcp_pos, obj_pos, obj_quat = tcp.p, obj.p, obj.q
        goal_pos, goal_quat = self._scene.goal(self._start, self._base.pose.p)
        self._last_obj_pos = obj_pos
        return Signals(
            tcp_pos=tcp_pos,
            tcp_quat=tcp.q,
            obj_pos=obj_pos,
            obj_quat=obj_quat,
            grasp_pos=self._scene.grasp_point(obj_pos, obj_quat, tcp_pos),
            goal_pos=goal_pos,
            goal_quat=goal_quat,
            is_grasped=np.bool_(is_grasped),
            is_contact=np.bool_(is_contact),
            success=np.bool_(self._is_success(obj_pos - goal_pos)),
            support_z=self._start.obj_pos[2],
        )

    def _is_shifted(self) -> bool:
        """Says whether the object has moved next to the tool."""
        obj, tcp_pos = self._obj.pose, self._tcp.entity_pose.p
        moved = obj.p - self._last_obj_pos
        if float(moved @ moved) <= CONTACT_DISPLACEMENT**2:
            return False
        return bool(np.linalg.norm(self._scene.grasp_point(obj.p, obj.q, tcp_pos) - tcp_pos) < CONTACT_REACH)

    def _is_success(self, to_goal: np.ndarray) -> bool:
        horizontal, vertical = self._scene.success_reach
        if np.hypot(to_goal[0], to_goal[1]) > horizontal or abs(to_goal[2]) > vertical:
            return False
        return bool(self._env.evaluate()["success"][0])

    def _forces_on_links(self) -> dict[Any, np.ndarray]:
        """Returns the force of the object on each link that it touches at the end of the step, in newtons."""
        forces: dict[Any, np.ndarray] = {}
        for contact in self._px.get_contacts():
            first, second = contact.bodies
            if second == self._obj_body and first in self._links:
                link, sign = first, 1.0
            elif first == self._obj_body and second in self._links:
                link, sign = second, -1.0
            else:
                continue
            impulse = np.sum([point.impulse for point in contact.points], axis=0)
            forces[link] = forces.get(link, 0.0) + sign * impulse / self._timestep
        return forces

    def _is_grasped(self, forces: Mapping[Any, np.ndarray]) -> bool:
        """Says whether both fingers press on the object along the direction in which they open."""
        for finger, outwards in zip(self._fingers, (1.0, -1.0), strict=True):
            force = forces.get(finger)
            norm = 0.0 if force is None else float(np.linalg.norm(force))
            if norm < GRASP_FORCE:
                return False
            cosine = outwards * float(body_axis(finger.entity_pose.q, 1) @ force) / norm
            if np.arccos(np.clip(cosine, -1.0, 1.0)) > GRASP_ANGLE:
                return False
        return True
