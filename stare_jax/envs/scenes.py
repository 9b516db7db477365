"""The table of ManiSkill tasks: how each is built, and how its `Signals` are read from the CPU simulator.

Everything is read from SAPIEN itself and computed in NumPy: on arrays of three numbers PyTorch costs more than the
physics of the step.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.types import Signals

CONTACT_DISPLACEMENT = 2e-3  # m: an object that moved further in one control step has been touched in between.
CONTACT_FORCE = 1e-2  # N, at the end of the control step.
GRASP_FORCE = 0.5  # N on each finger, and the angle below: the simulator's own definition of a grasp.
GRASP_ANGLE = np.deg2rad(85)

CUBE_SIZE = 0.04
PEG_HALF_LENGTH = 0.12


class Start(NamedTuple):
    """An episode's first state, as far as goals depend on it."""

    obj_pos: np.ndarray
    obj_quat: np.ndarray


class Scene(NamedTuple):
    """One task of the simulator. Positions are float32 `[3]`, quaternions float32 `[4]`, wxyz."""

    robot: str
    camera: str
    action_dims: Mapping[str, int]
    """control mode -> action dimensions; the first mode is the default."""
    objects: Callable[[Any], tuple[Any, Any]]
    """environment -> (the manipulated actor, the actor that the goal hangs on: itself where none does)."""
    goal: Callable[[Start, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """(start, position of the actor that the goal hangs on) -> (goal_pos, goal_quat)."""
    grasp_point: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """(obj_pos, obj_quat, tcp_pos) -> grasp_pos."""
    success_reach: tuple[float, float]
    """(horizontal, vertical) distance of the object to its goal, in metres, beyond which success is impossible. It
    spares asking the simulator, which decides everywhere else."""


def _at_region(start: Start, region_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([region_pos[0], region_pos[1], start.obj_pos[2]], np.float32), start.obj_quat


def _on_top(start: Start, support_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return support_pos + np.array([0, 0, CUBE_SIZE], np.float32), start.obj_quat


def _upright(start: Start, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over where the peg lay, turned about the horizontal axis that brings its x axis up."""
    axis = body_axis(start.obj_quat, 0)
    horizontal = np.array([axis[1], -axis[0], 0.0])  # axis x up
    half = np.sqrt(0.5)
    w, v = half, half * horizontal / np.linalg.norm(horizontal)
    w0, v0 = start.obj_quat[0], start.obj_quat[1:]
    quat = np.concatenate([[w * w0 - v @ v0], w * v0 + w0 * v + np.cross(v, v0)])
    return np.array([start.obj_pos[0], start.obj_pos[1], PEG_HALF_LENGTH], np.float32), quat.astype(np.float32)


def _centre(obj_pos: np.ndarray, obj_quat: np.ndarray, tcp_pos: np.ndarray) -> np.ndarray:
    return obj_pos


def _nearest_on_peg(obj_pos: np.ndarray, obj_quat: np.ndarray, tcp_pos: np.ndarray) -> np.ndarray:
    axis = body_axis(obj_quat, 0)
    along = np.clip((tcp_pos - obj_pos) @ axis, -PEG_HALF_LENGTH, PEG_HALF_LENGTH)
    return (obj_pos + along * axis).astype(np.float32)


def body_axis(quat: np.ndarray, index: int) -> np.ndarray:
    """Returns the unit vector `[3]`, float64, of body axis `index` (0, 1, 2) in the world."""
    w, x, y, z = (float(part) for part in quat)
    columns = (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.array(columns[index])


_PANDA_ACTION_DIMS = MappingProxyType(
    {
        "pd_ee_delta_pose": 7,
        "pd_ee_target_delta_pose": 7,
        "pd_ee_delta_pos": 4,
        "pd_ee_target_delta_pos": 4,
        "pd_joint_delta_pos": 8,
        "pd_joint_target_delta_pos": 8,
    }
)


def _panda(**task: Any) -> Scene:
    return Scene(robot="panda", camera="base_camera", action_dims=_PANDA_ACTION_DIMS, **task)


def _cube_and_region(env: Any) -> tuple[Any, Any]:
    return env.obj, env.goal_region


SCENES: Mapping[str, Scene] = MappingProxyType(
    {
        "PushCube-v1": _panda(
            objects=_cube_and_region, goal=_at_region, grasp_point=_centre, success_reach=(0.101, np.inf)
        ),
        "PullCube-v1": _panda(
            objects=_cube_and_region, goal=_at_region, grasp_point=_centre, success_reach=(0.101, np.inf)
        ),
        "StackCube-v1": _panda(
            objects=lambda env: (env.cubeA, env.cubeB),
            goal=_on_top,
            grasp_point=_centre,
            success_reach=(0.035, 0.006),
        ),
        "LiftPegUpright-v1": _panda(
            objects=lambda env: (env.peg, env.peg),
            goal=_upright,
            grasp_point=_nearest_on_peg,
            success_reach=(np.inf, 0.006),
        ),
    }
)


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
        self._tcp = agent.tcp._objs[0]
        self._obj, self._obj_body, self._base = obj._objs[0], obj._bodies[0], base._objs[0]
        self._fingers = (agent.finger1_link._objs[0], agent.finger2_link._objs[0])
        self._articulation = agent.robot._objs[0]
        self._links = frozenset(link._objs[0] for link in agent.robot.links)

    def gripper_opening(self) -> float:
        """Returns the distance between the fingers, in metres."""
        return float(self._articulation.qpos[-2:].sum())

    def begin(self) -> Signals:
        """Returns the signals of an episode's first state, right after a reset."""
        pose = self._obj.pose
        self._start = Start(pose.p, pose.q)
        # The contacts that the simulator still lists are those of the episode before.
        return self._read(is_grasped=False, is_contact=False)

    def read(self) -> Signals:
        """Returns the signals of the state after a control step."""
        forces = self._forces_on_links()
        moved = self._obj.pose.p - self._last_obj_pos
        touched = any(np.linalg.norm(force) > CONTACT_FORCE for force in forces.values())
        return self._read(
            is_grasped=self._is_grasped(forces),
            is_contact=touched or float(moved @ moved) > CONTACT_DISPLACEMENT**2,
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
