"""The table of ManiSkill tasks, one row each: how a task is built, what acts in it, and where its goal is."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.rotations import body_axis

CUBE_SIZE = 0.04
PEG_HALF_LENGTH = 0.12


class Start(NamedTuple):
    """An episode's first state, as far as goals depend on it."""

    obj_pos: np.ndarray
    obj_quat: np.ndarray
    on_top: float
    """height of the object's centre over that of what it is put on, in metres; 0 where it is put on nothing."""


class Camera(NamedTuple):
    """The camera that policies look through."""

    name: str
    size: tuple[int, int]
    """(height, width) in pixels of the simulator's own images."""
    intrinsics: tuple[tuple[float, ...], ...] | None = None
    """camera matrix `[3, 3]` at that size; None for a field of view that is the same at any size."""


class Scene(NamedTuple):
    """One task of the simulator. Positions are float32 `[3]`, quaternions float32 `[4]`, wxyz."""

    robot: str
    """the simulator's name of it; empty where the task brings its own."""
    camera: Camera
    horizon: int
    """actions an episode may take, unless a configuration says otherwise (B.5)."""
    action_dims: Mapping[str, int]
    """control mode -> action dimensions; the first mode is the default."""
    action_scale: tuple[float, ...]
    """`[A]` of the default control mode: the largest command of each dimension that is of use."""
    tool: Callable[[Any], Any]
    """environment -> the link whose origin is the tool centre point."""
    objects: Callable[[Any], tuple[Any, Any]]
    """environment -> (the manipulated actor, the actor that the goal hangs on: itself where none does)."""
    on_top: Callable[[Any], float]
    """environment, after a reset -> `Start.on_top`."""
    goal: Callable[[Start, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """(start, position of the actor that the goal hangs on) -> (goal_pos, goal_quat)."""
    grasp_point: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """(obj_pos, obj_quat, tcp_pos) -> grasp_pos."""
    success_reach: tuple[float, float]
    """(horizontal, vertical) distance of the object to its goal, in metres, beyond which success is impossible. It
    spares asking the simulator, which decides everywhere else."""
    num_starts: int = 0
    """distinct first states of the task's official evaluation; 0 where the seed draws them."""
    assets: tuple[str, ...] = ()
    """files that the task needs and ManiSkill does not come with, by its own names for them."""


# ---- Goals -----------------------------------------------------------------------------------------------------------


def _at_region(start: Start, region_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([region_pos[0], region_pos[1], start.obj_pos[2]], np.float32), start.obj_quat


def _on_top(start: Start, support_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return support_pos + np.array([0, 0, start.on_top], np.float32), start.obj_quat


def _upright(start: Start, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over where the peg lay, turned about the horizontal axis that brings its x axis up."""
    axis = body_axis(start.obj_quat, 0)
    horizontal = np.array([axis[1], -axis[0], 0.0])  # axis x up
    half = np.sqrt(0.5)
    w, v = half, half * horizontal / np.linalg.norm(horizontal)
    w0, v0 = start.obj_quat[0], start.obj_quat[1:]
    quat = np.concatenate([[w * w0 - v @ v0], w * v0 + w0 * v + np.cross(v, v0)])
    return np.array([start.obj_pos[0], start.obj_pos[1], PEG_HALF_LENGTH], np.float32), quat.astype(np.float32)


def _on_nothing(env: Any) -> float:
    return 0.0


def _on_a_cube(env: Any) -> float:
    return CUBE_SIZE


def _half_heights(env: Any) -> float:
    """The half heights of the object, as it lies, and of the target."""
    obj, target = (env.objs[name] for name in (env.source_obj_name, env.target_obj_name))
    sizes = (env.episode_model_bbox_sizes[name].numpy() for name in (env.source_obj_name, env.target_obj_name))
    return sum(0.5 * _extent_z(actor.pose.q[0].numpy(), size) for actor, size in zip((obj, target), sizes, strict=True))


def _extent_z(quat: np.ndarray, size: np.ndarray) -> float:
    """Returns the vertical extent of a rotated box."""
    return float(sum(abs(body_axis(quat, index)[2]) * size[index] for index in range(3)))


# ---- Where the tool should go ----------------------------------------------------------------------------------------


def _centre(obj_pos: np.ndarray, obj_quat: np.ndarray, tcp_pos: np.ndarray) -> np.ndarray:
    return obj_pos


def _nearest_on_peg(obj_pos: np.ndarray, obj_quat: np.ndarray, tcp_pos: np.ndarray) -> np.ndarray:
    axis = body_axis(obj_quat, 0)
    along = np.clip((tcp_pos - obj_pos) @ axis, -PEG_HALF_LENGTH, PEG_HALF_LENGTH)
    return (obj_pos + along * axis).astype(np.float32)


# ---- The table -------------------------------------------------------------------------------------------------------

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
_WIDOWX_ACTION_DIMS = MappingProxyType({"arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos": 7})


def _panda(**task: Any) -> Scene:
    shared = {"camera": Camera("base_camera", (128, 128)), "grasp_point": _centre, "on_top": _on_nothing}
    return Scene(
        robot="panda",
        horizon=30,
        action_dims=_PANDA_ACTION_DIMS,
        action_scale=(1.0,) * 7,
        tool=lambda env: env.agent.tcp,
        **(shared | task),
    )


def _widowx(num_starts: int, success_height: float) -> Scene:
    """SimplerEnv's tasks. Success is where the object's centre is over the target, up to 9 cm aside, and up to
    `success_height` above where it would rest."""
    return Scene(
        robot="",
        camera=Camera("3rd_view_camera", (480, 640), ((623.588, 0, 319.501), (0, 623.588, 239.545), (0, 0, 1))),
        horizon=60,
        action_dims=_WIDOWX_ACTION_DIMS,
        action_scale=(0.05, 0.05, 0.05, 0.35, 0.35, 0.35, 1.0),
        tool=lambda env: env.agent.robot.links_map["ee_gripper_link"],
        objects=lambda env: (env.objs[env.source_obj_name], env.objs[env.target_obj_name]),
        on_top=_half_heights,
        goal=_on_top,
        grasp_point=_centre,
        success_reach=(0.09, success_height),
        num_starts=num_starts,
        assets=("bridge_v2_real2sim", "widowx250s"),
    )


def _cube_and_region(env: Any) -> tuple[Any, Any]:
    return env.obj, env.goal_region


SCENES: Mapping[str, Scene] = MappingProxyType(
    {
        "PushCube-v1": _panda(objects=_cube_and_region, goal=_at_region, success_reach=(0.101, np.inf)),
        "PullCube-v1": _panda(objects=_cube_and_region, goal=_at_region, success_reach=(0.101, np.inf)),
        "StackCube-v1": _panda(
            objects=lambda env: (env.cubeA, env.cubeB), goal=_on_top, on_top=_on_a_cube, success_reach=(0.035, 0.006)
        ),
        "LiftPegUpright-v1": _panda(
            objects=lambda env: (env.peg, env.peg),
            goal=_upright,
            grasp_point=_nearest_on_peg,
            success_reach=(np.inf, 0.006),
        ),
        "PutSpoonOnTableClothInScene-v1": _widowx(24, success_height=0.06),
        "PutCarrotOnPlateInScene-v1": _widowx(24, success_height=0.06),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": _widowx(24, success_height=0.06),
        "PutEggplantInBasketScene-v1": _widowx(64, success_height=0.12),
    }
)
