"""The table of ManiSkill tasks, one row each: how a task is built, what acts in it, and where its goal is.

What depends on a state is written for one environment, in the namespace of its arrays: simulators on the CPU call it
with NumPy at every step, a batch on the GPU maps and compiles it with JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.rotations import body_axis
from stare_jax.types import Array

CUBE_SIZE = 0.04
PEG_HALF_LENGTH = 0.12


class Start(NamedTuple):
    """An episode's first state, as far as goals depend on it."""

    obj_pos: Array
    obj_quat: Array
    on_top: float | Array
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
    on_top: Callable[[Any], Callable[[Array, Array], float | Array]]
    """environment -> ((obj_quat, orientation of the actor that the goal hangs on), after a reset -> `Start.on_top`)."""
    goal: Callable[[Start, Array], tuple[Array, Array]]
    """(start, position of the actor that the goal hangs on) -> (goal_pos, goal_quat)."""
    grasp_point: Callable[[Array, Array, Array], Array]
    """(obj_pos, obj_quat, tcp_pos) -> grasp_pos."""
    contact_every: int
    """physics sub-steps from one look at the contacts to the next; touches that begin and end between two are missed,
    but a look costs as much as a tenth to a quarter of a sub-step."""
    success_reach: tuple[float, float]
    """(horizontal, vertical) distance of the object to its goal, in metres, beyond which success is impossible. It
    spares asking the simulator, which decides everywhere else."""
    num_starts: int = 0
    """distinct first states of the task's official evaluation; 0 where the seed draws them."""
    assets: tuple[str, ...] = ()
    """files that the task needs and ManiSkill does not come with, by its own names for them."""


# ---- Goals -----------------------------------------------------------------------------------------------------------


def _at_region(start: Start, region_pos: Array) -> tuple[Array, Array]:
    xp = region_pos.__array_namespace__()
    return xp.array([region_pos[0], region_pos[1], start.obj_pos[2]], xp.float32), start.obj_quat


def _on_top(start: Start, support_pos: Array) -> tuple[Array, Array]:
    xp = support_pos.__array_namespace__()
    return support_pos + xp.array([0, 0, start.on_top], xp.float32), start.obj_quat


def _upright(start: Start, _: Array) -> tuple[Array, Array]:
    """Over where the peg lay, turned about the horizontal axis that brings its x axis up."""
    axis = body_axis(start.obj_quat, 0)
    xp = axis.__array_namespace__()
    horizontal = xp.array([axis[1], -axis[0], 0.0])  # axis x up
    half = np.sqrt(0.5)
    w, v = half, half * horizontal / xp.linalg.norm(horizontal)
    w0, v0 = start.obj_quat[0], start.obj_quat[1:]
    quat = xp.append(w * w0 - v @ v0, w * v0 + w0 * v + xp.cross(v, v0))
    return xp.array([start.obj_pos[0], start.obj_pos[1], PEG_HALF_LENGTH], xp.float32), quat.astype(xp.float32)


def _on_nothing(obj_quat: Array, target_quat: Array) -> float:
    return 0.0


def _on_a_cube(obj_quat: Array, target_quat: Array) -> float:
    return CUBE_SIZE


def _half_heights(env: Any) -> Callable[[Array, Array], float | Array]:
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


def _centre(obj_pos: Array, obj_quat: Array, tcp_pos: Array) -> Array:
    return obj_pos


def _nearest_on_peg(obj_pos: Array, obj_quat: Array, tcp_pos: Array) -> Array:
    axis = body_axis(obj_quat, 0)
    xp = axis.__array_namespace__()
    along = xp.clip((tcp_pos - obj_pos) @ axis, -PEG_HALF_LENGTH, PEG_HALF_LENGTH)
    return (obj_pos + along * axis).astype(xp.float32)


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
    shared = {"camera": Camera("base_camera", (128, 128)), "grasp_point": _centre, "on_top": lambda env: _on_nothing}
    return Scene(
        robot="panda",
        horizon=30,
        action_dims=_PANDA_ACTION_DIMS,
        action_scale=(1.0,) * 7,
        contact_every=1,
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
        contact_every=5,
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
            objects=lambda env: (env.cubeA, env.cubeB),
            goal=_on_top,
            on_top=lambda env: _on_a_cube,
            success_reach=(0.035, 0.006),
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
