"""The `Signals` of a batch of environments, computed on its device.

PyTorch reads the simulator, with calls that work on the CPU and on a GPU; JAX computes signals from the reading, by the
function that `SignalReader` calls for one environment, mapped and compiled.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.maniskill.scenes import OnTop, Scene, Start
from stare_jax.envs.maniskill.signals import CONTACT_FORCE, Poses, signals_of
from stare_jax.types import Array, Signals


class Reading(NamedTuple):
    """Quantities read from the simulator, `[B, ...]`; a pose is position and quaternion."""

    tcp: Any
    """float32 `[7]`."""
    obj: Any
    """float32 `[7]`."""
    base: Any
    """float32 `[7]`, of the actor that the goal hangs on."""
    gripper_opening: Any
    """float32: distance between the fingers, in metres."""
    is_touched: Any
    """bool: a link of the robot has pressed on the object at a sub-step of the control step."""
    is_grasped: Any
    success: Any


class BatchedSignalReader:
    """Reads the `Signals` of a built batch; see `SignalReader`. Call `look` after the sub-steps of the physics."""

    def __init__(self, env: Any, scene: Scene):
        """
        Args:
            env: the unwrapped `mani_skill` environment, on either of its backends.
            scene: its row of the table.
        """
        self._env, self._tool, (self._obj, self._base) = env, scene.tool(env), scene.objects(env)
        self._links = [link for link in env.agent.robot.links if link._bodies[0].collision_shapes]
        self._contacts = self._contact_query() if env.scene.gpu_sim_enabled else None
        self._measure = jax.jit(jax.vmap(functools.partial(signals_of_reading, scene, scene.on_top(env))))
        self._start: Start | None = None
        self._is_touched: Any = None

    def look(self) -> None:
        """Notes in which environments the robot touches the object at this sub-step."""
        import torch

        is_touched = (torch.linalg.norm(self._forces(), dim=-1) > CONTACT_FORCE).any(dim=0)
        self._is_touched = is_touched if self._is_touched is None else self._is_touched | is_touched

    def ask(self, success: Any) -> Reading:
        """Returns the reading of each environment's present state, as tensors, some of them the simulator's buffers.

        Args:
            success: bool tensor `[B]`: success in this state, by the environment's own `evaluate`.
        """
        import torch

        is_touched, self._is_touched = self._is_touched, None
        return Reading(
            tcp=self._tool.pose.raw_pose,
            obj=self._obj.pose.raw_pose,
            base=self._base.pose.raw_pose,
            gripper_opening=self._env.agent.robot.get_qpos()[:, -2:].sum(dim=-1),
            is_touched=torch.zeros_like(success) if is_touched is None else is_touched,
            is_grasped=self._env.agent.is_grasping(self._obj),
            success=success,
        )

    def read(self, reading: Reading, is_first: np.ndarray) -> Signals:
        """Returns the signals of a reading whose leaves have become JAX arrays.

        Args:
            reading: of the state after the one read last.
            is_first: bool `[B]`: where an episode begins. The contacts that the simulator still lists there are those
                of the episode before, and do not count.
        """
        if self._start is None:
            pos, quat = jnp.zeros_like(reading.obj[:, :3]), jnp.zeros_like(reading.obj[:, 3:])
            self._start = Start(pos, quat, pos[:, 0])
        self._start, signals = self._measure(self._start, reading, is_first)
        return signals

    def _contact_query(self) -> Any:
        """Returns one query for all links: it is put at every sub-step."""
        pairs = [pair for link in self._links for pair in zip(link._bodies, self._obj._bodies, strict=True)]
        return self._env.scene.px.gpu_create_contact_pair_impulse_query(pairs)

    def _forces(self) -> Any:
        """Returns the force `[links, B, 3]` between each link and the object at this sub-step, in newtons."""
        import torch

        scene = self._env.scene
        if self._contacts is None:
            return torch.stack([scene.get_pairwise_contact_forces(link, self._obj) for link in self._links])
        scene.px.gpu_query_contact_pair_impulses(self._contacts)
        impulses = self._contacts.cuda_impulses.torch()
        return impulses.view(len(self._links), -1, 3) / scene.px.timestep


def signals_of_reading(
    scene: Scene, on_top: OnTop, start: Start, reading: Reading, is_first: Array
) -> tuple[Start, Signals]:
    """Returns how the episode of one environment began, and its signals.

    Args:
        scene: the task's row of the table.
        on_top: what the row's `on_top` returned for the environments.
        start: of the episode before; of no effect where `is_first`.
        reading: of the state.
        is_first: whether an episode begins with it.
    """
    poses = Poses(*(part for pose in reading[:3] for part in (pose[:3], pose[3:])))
    begun = Start(poses.obj_pos, poses.obj_quat, on_top(poses.obj_quat, poses.base_quat))
    start = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), begun, start)
    flags = {"is_grasped": reading.is_grasped & ~is_first, "is_contact": reading.is_touched & ~is_first}
    return start, signals_of(scene, start, poses, success=reading.success, **flags)
