"""`Signals` of a state of the simulator, and the reader of one environment on the CPU.

The reader calls SAPIEN directly and computes in NumPy: on arrays of three numbers PyTorch costs more than the physics
of the step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.maniskill.scenes import Scene, Start
from stare_jax.stages.geometry import body_axis
from stare_jax.types import Array, Signals

CONTACT_FORCE = 1e-2  # N, of the robot on the object.
GRASP_FORCE = 0.5  # N on each finger, and the angle below: the simulator's own definition of a grasp.
GRASP_ANGLE = np.deg2rad(85)


class Poses(NamedTuple):
    """Poses of the bodies of one environment: positions float32 `[3]`, quaternions float32 `[4]`, wxyz."""

    tcp_pos: Array
    tcp_quat: Array
    obj_pos: Array
    obj_quat: Array
    base_pos: Array
    """position of the actor that the goal is relative to; below its orientation."""
    base_quat: Array


def signals_of(
    scene: Scene, start: Start, poses: Poses, *, is_grasped: Array, is_contact: Array, success: Array
) -> Signals:
    """Returns the signals of one environment, in the namespace of its arrays.

    Args:
        scene: the task's row of the table.
        start: of the episode.
        poses: in the state.
        is_grasped: whether the robot grasps the object in the state, by the simulator's own test.
        is_contact: whether the robot has touched the object in the control step that led to the state.
        success: whether the state is a success, by the simulator's own test.
    """
    goal_pos, goal_quat = scene.goal(start, poses.base_pos)
    return Signals(
        tcp_pos=poses.tcp_pos,
        tcp_quat=poses.tcp_quat,
        obj_pos=poses.obj_pos,
        obj_quat=poses.obj_quat,
        grasp_pos=scene.grasp_point(poses.obj_pos, poses.obj_quat, poses.tcp_pos),
        goal_pos=goal_pos,
        goal_quat=goal_quat,
        is_grasped=is_grasped,
        is_contact=is_contact,
        success=success,
        support_z=start.obj_pos[2],
    )


class SignalReader:
    """Reads the `Signals` of one built scene; a reconfigured scene needs a new one.

    A push that knocks the object away is over at the end of the control step: call `look` after sub-steps of the
    physics.
    """

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
        self._forces: Mapping[Any, np.ndarray] = {}
        self.is_touched = False
        """True if a `look` of this control step has seen the robot touch the object."""

    def gripper_opening(self) -> float:
        """Returns the distance between the fingers, in metres."""
        return float(self._articulation.qpos[-2:].sum())

    def begin(self) -> Signals:
        """Returns the signals of an episode's first state, right after a reset."""
        poses = self._poses()
        self._start = Start(poses.obj_pos, poses.obj_quat, self._on_top(poses.obj_quat, poses.base_quat))
        # The contacts that the simulator still lists are those of the episode before.
        self._forces, self.is_touched = {}, False
        return self._signals(poses)

    def shift_start(self, shift: np.ndarray) -> None:
        """Goals that depend on where the episode began are as if it had begun `shift` `[3]` metres away."""
        self._start = self._start._replace(obj_pos=self._start.obj_pos + shift)

    def look(self) -> None:
        """Notes which links the object touches at this sub-step."""
        self._forces = self._forces_on_links()
        self.is_touched = self.is_touched or any(
            np.linalg.norm(force) > CONTACT_FORCE for force in self._forces.values()
        )

    def read(self) -> Signals:
        """Returns the signals of the state after a control step; `look` has been called after its last sub-step."""
        signals = self._signals(self._poses())
        self.is_touched = False
        return signals

    def _poses(self) -> Poses:
        tcp, obj, base = self._tcp.entity_pose, self._obj.pose, self._base.pose
        return Poses(tcp.p, tcp.q, obj.p, obj.q, base.p, base.q)

    def _signals(self, poses: Poses) -> Signals:
        flags = {"is_grasped": np.bool_(self._is_grasped()), "is_contact": np.bool_(self.is_touched)}
        signals = signals_of(self._scene, self._start, poses, success=np.bool_(False), **flags)
        return signals._replace(success=np.bool_(self._is_success(signals.obj_pos - signals.goal_pos)))

    def _is_success(self, to_goal: np.ndarray) -> bool:
        horizontal, vertical = self._scene.success_reach
        if np.hypot(to_goal[0], to_goal[1]) > horizontal or abs(to_goal[2]) > vertical:
            return False
        return bool(self._env.evaluate()["success"][0])

    def _forces_on_links(self) -> dict[Any, np.ndarray]:
        """Returns the force of the object on each link that it touches at this sub-step, in newtons."""
        forces: dict[Any, np.ndarray] = {}
        # Bodies that are merely near are also listed, with impulses of zero; Python's numbers add up fastest.
        for contact in self._px.get_contacts():
            first, second = contact.bodies
            if second == self._obj_body and first in self._links:
                link, sign = first, 1.0
            elif first == self._obj_body and second in self._links:
                link, sign = second, -1.0
            else:
                continue
            impulse = [sum(parts) for parts in zip(*(point.impulse.tolist() for point in contact.points), strict=True)]
            if any(impulse):
                forces[link] = forces.get(link, 0.0) + np.array(impulse) * (sign / self._timestep)
        return forces

    def _is_grasped(self) -> bool:
        """Says whether both fingers press on the object along the direction in which they open."""
        for finger, outwards in zip(self._fingers, (1.0, -1.0), strict=True):
            force = self._forces.get(finger)
            norm = 0.0 if force is None else float(np.linalg.norm(force))
            if norm < GRASP_FORCE:
                return False
            cosine = outwards * float(body_axis(finger.entity_pose.q, 1) @ force) / norm
            if np.arccos(np.clip(cosine, -1.0, 1.0)) > GRASP_ANGLE:
                return False
        return True
