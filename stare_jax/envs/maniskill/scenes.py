"""The table of ManiSkill tasks, one row each: how a task is built, which robot acts in it, and where its goal is.

Functions of a state are written for one environment, in the namespace of its arrays: simulators on the CPU call them
with NumPy at every step, a batch on the GPU maps and compiles them with JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.stages.geometry import body_axis
from stare_jax.types import Array

CUBE_SIZE = 0.04
PEG_HALF_LENGTH = 0.12


class Start(NamedTuple):
    """The part of an episode's first state that goals depend on."""

    obj_pos: Array
    obj_quat: Array
    on_top: float | Array
    """height of the object's centre above the centre of its support at the goal, in metres; 0 without a support."""


class Camera(NamedTuple):
    """The camera that policies look through."""

    name: str
    size: tuple[int, int]
    """(height, width) in pixels of the task's own images."""
    intrinsics: tuple[tuple[float, ...], ...] | None = None
    """camera matrix `[3, 3]` at that size; None for a field of view that is the same at any size."""


class Scene(NamedTuple):
    """One task of the simulator. Positions are float32 `[3]`, quaternions float32 `[4]`, wxyz."""

    robot: str
    """the simulator's name of the robot; empty if the task has only one."""
    camera: Camera
    horizon: int
    """actions that an episode may take, if the configuration does not set another number (B.5)."""
    action_dims: Mapping[str, int]
    """control mode -> action dimensions; the first mode is the default."""
    action_scale: tuple[float, ...]
    """`[A]`: the largest useful command of each dimension in the default control mode."""
    tool: Callable[[Any], Any]
    """environment -> the link whose origin is the tool centre point."""
    objects: Callable[[Any], tuple[Any, Any]]
    """environment -> (the manipulated actor, the actor that the goal is relative to, the same one if there is none)."""
    on_top: Callable[[Any], Callable[[Array, Array], float | Array]]
    """environment -> function that is called after a reset, see `OnTop`."""
    goal: Callable[[Start, Array], tuple[Array, Array]]
    """(start, position of the actor that the goal is relative to) -> (goal_pos, goal_quat)."""
    grasp_point: Callable[[Array, Array, Array], Array]
    """(obj_pos, obj_quat, tcp_pos) -> grasp_pos."""
    contact_every: int
    """physics sub-steps from one reading of the contacts to the next. Touches that begin and end between two readings
    are missed, but a reading costs as much as a tenth to a quarter of a sub-step."""
    success_reach: tuple[float, float]
    """(horizontal, vertical) distance of the object to its goal, in metres, beyond which success is impossible. Only
    within it the simulator is asked, whose own test decides."""
    num_starts: int = 0
    """number of first states in the task's official evaluation; 0 if the seed draws them at random."""
    assets: tuple[str, ...] = ()
    """files that the task needs and that are not in ManiSkill's package, by ManiSkill's names."""


# ---- Goals -----------------------------------------------------------------------------------------------------------


def goal_at_region(start: Start, region_pos: Array) -> tuple[Array, Array]:
    """Returns the goal of an object that is pushed over a region: the region's place at the object's own height."""
    xp = region_pos.__array_namespace__()
    return xp.array([region_pos[0], region_pos[1], start.obj_pos[2]], xp.float32), start.obj_quat


def goal_on_top(start: Start, support_pos: Array) -> tuple[Array, Array]:
    """Returns the goal of an object that is put on another: `start.on_top` over that one's centre, as it began."""
    xp = support_pos.__array_namespace__()
    return support_pos + xp.array([0, 0, start.on_top], xp.float32), start.obj_quat


def _upright(start: Start, _: Array) -> tuple[Array, Array]:
    """Returns the goal of the peg: over where it lay, turned about the horizontal axis that brings its x axis up."""
    axis = body_axis(start.obj_quat, 0)
    xp = axis.__array_namespace__()
    horizontal = xp.array([axis[1], -axis[0], 0.0])  # axis x up
    half = np.sqrt(0.5)
    w, v = half, half * horizontal / xp.linalg.norm(horizontal)
    w0, v0 = start.obj_quat[0], start.obj_quat[1:]
    quat = xp.append(w * w0 - v @ v0, w * v0 + w0 * v + xp.cross(v, v0))
    return xp.array([start.obj_pos[0], start.obj_pos[1], PEG_HALF_LENGTH], xp.float32), quat.astype(xp.float32)


OnTop = Callable[[Array, Array], float | Array]
"""(orientations of the object and of the actor that the goal is relative to) -> `Start.on_top`."""


def fixed_height(height: float) -> Callable[[Any], OnTop]:
    """Returns a `Scene.on_top` that is the same in every episode, in metres."""

    def on_top(obj_quat: Array, target_quat: Array) -> float:
        return height

    return lambda env: on_top


ON_NOTHING = fixed_height(0.0)


def _half_heights(env: Any) -> OnTop:
    """Returns the sum of the half heights of the object, as it lies, and of the target.

    ManiSkill's own boxes are turned by the orientation in the first environment of a batch.
    """
    sizes = [env.episode_model_bbox_sizes[name].tolist() for name in (env.source_obj_name, env.target_obj_name)]

    def on_top(*quats: Array) -> float | Array:
        return sum(0.5 * _extent_z(quat, size) for quat, size in zip(quats, sizes, strict=True))

    return on_top


def _extent_z(quat: Array, size: Sequence[float]) -> float | Array:
    """Returns the vertical extent of a rotated box."""
    return sum(abs(body_axis(quat, index)[2]) * size[index] for index in range(3))


# ---- Where the tool should go ----------------------------------------------------------------------------------------


def centre(obj_pos: Array, obj_quat: Array, tcp_pos: Array) -> Array:
    """Returns the object's centre, as the point to grasp or push."""
    return obj_pos


def _nearest_on_peg(obj_pos: Array, obj_quat: Array, tcp_pos: Array) -> Array:
    axis = body_axis(obj_quat, 0)
    xp = axis.__array_namespace__()
    along = xp.clip((tcp_pos - obj_pos) @ axis, -PEG_HALF_LENGTH, PEG_HALF_LENGTH)
    return (obj_pos + along * axis).astype(xp.float32)


# ---- Rows ------------------------------------------------------------------------------------------------------------

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
PANDA_CAMERA = Camera("base_camera", (128, 128))


def panda_scene(
    *,
    objects: Callable[[Any], tuple[Any, Any]],
    goal: Callable[[Start, Array], tuple[Array, Array]],
    success_reach: tuple[float, float],
    on_top: Callable[[Any], OnTop] = ON_NOTHING,
    grasp_point: Callable[[Array, Array, Array], Array] = centre,
    horizon: int = 30,
    camera: Camera = PANDA_CAMERA,
) -> Scene:
    """Returns the row of a tabletop task of ManiSkill's Panda; the arguments are fields of `Scene`."""
    return Scene(
        robot="panda",
        camera=camera,
        horizon=horizon,
        action_dims=_PANDA_ACTION_DIMS,
        action_scale=(1.0,) * 7,
        tool=lambda env: env.agent.tcp,
        objects=objects,
        on_top=on_top,
        goal=goal,
        grasp_point=grasp_point,
        contact_every=1,
        success_reach=success_reach,
    )


def widowx_scene(num_starts: int, success_height: float) -> Scene:
    """Returns the row of a task of SimplerEnv.

    Args:
        num_starts: as in `Scene`.
        success_height: metres above the object's place of rest on its target up to which the simulator may call a state
            a success; horizontally it is up to 9 cm.
    """
    return Scene(
        robot="",
        camera=Camera("3rd_view_camera", (480, 640), ((623.588, 0, 319.501), (0, 623.588, 239.545), (0, 0, 1))),
        horizon=60,
        action_dims=_WIDOWX_ACTION_DIMS,
        action_scale=(0.05, 0.05, 0.05, 0.35, 0.35, 0.35, 1.0),
        tool=lambda env: env.agent.robot.links_map["ee_gripper_link"],
        objects=lambda env: (env.objs[env.source_obj_name], env.objs[env.target_obj_name]),
        on_top=_half_heights,
        goal=goal_on_top,
        grasp_point=centre,
        contact_every=5,
        success_reach=(0.09, success_height),
        num_starts=num_starts,
        assets=("bridge_v2_real2sim", "widowx250s"),
    )


def _cube_and_region(env: Any) -> tuple[Any, Any]:
    return env.obj, env.goal_region


# ---- The table -------------------------------------------------------------------------------------------------------

SCENES: Mapping[str, Scene] = MappingProxyType(
    {
        "PushCube-v1": panda_scene(objects=_cube_and_region, goal=goal_at_region, success_reach=(0.101, np.inf)),
        "PullCube-v1": panda_scene(objects=_cube_and_region, goal=goal_at_region, success_reach=(0.101, np.inf)),
        "StackCube-v1": panda_scene(
            objects=lambda env: (env.cubeA, env.cubeB),
            goal=goal_on_top,
            on_top=fixed_height(CUBE_SIZE),
            success_reach=(0.035, 0.006),
        ),
        "LiftPegUpright-v1": panda_scene(
            objects=lambda env: (env.peg, env.peg),
            goal=_upright,
            grasp_point=_nearest_on_peg,
            success_reach=(np.inf, 0.006),
        ),
        "PutSpoonOnTableClothInScene-v1": widowx_scene(24, success_height=0.06),
        "PutCarrotOnPlateInScene-v1": widowx_scene(24, success_height=0.06),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": widowx_scene(24, success_height=0.06),
        "PutEggplantInBasketScene-v1": widowx_scene(64, success_height=0.12),
    }
)
