"""What a batch of environments says of its states, as `Signals`, without going through the host.

PyTorch reads what the simulator has, in calls that it answers on the CPU and on a GPU; JAX makes signals of it, by the
functions that `SignalReader` calls for one environment, mapped and compiled.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.envs.bridge import torch_to_jax
from stare_jax.envs.scenes import Scene, Start
from stare_jax.envs.signals import CONTACT_DISPLACEMENT, CONTACT_FORCE, CONTACT_REACH
from stare_jax.types import Array, Signals


class Reading(NamedTuple):
    """What the simulator is asked for, `[B, ...]`; a pose is position and quaternion."""

    tcp: Any
    """float32 `[7]`."""
    obj: Any
    """float32 `[7]`."""
    base: Any
    """float32 `[7]`, of the actor that the goal hangs on."""
    gripper_opening: Any
    """float32: distance between the fingers, in metres."""
    is_touched: Any
    """bool: a link of the robot presses on the object at the end of the control step."""
    is_grasped: Any
    success: Any


class Memory(NamedTuple):
    """What signals need to know of the states before."""

    start: Start
    obj_pos: Array
    """of the last state."""


class BatchedSignalReader:
    """Reads the `Signals` of a built batch; see `SignalReader` for what they mean."""

    def __init__(self, env: Any, scene: Scene):
        """
        Args:
            env: the unwrapped `mani_skill` environment, on either of its backends.
            scene: its row of the table.
        """
        self._env, self._tool, (self._obj, self._base) = env, scene.tool(env), scene.objects(env)
        self._links = [link for link in env.agent.robot.links if link._bodies[0].collision_shapes]
        self._measure = jax.jit(jax.vmap(functools.partial(measure, scene, scene.on_top(env))))
        self._memory: Memory | None = None

    def read(self, success: Any, is_first: np.ndarray) -> tuple[Signals, jax.Array]:
        """Returns the signals of the state that each environment is in, and its gripper's opening, `[B]`.

        Args:
            success: bool tensor `[B]`: what the environment's own `evaluate` says of this state.
            is_first: bool `[B]`: where an episode begins. The contacts that the simulator still lists there are those
                of the episode before, and do not count.
        """
        reading = jax.tree.map(torch_to_jax, self._ask(success))
        if self._memory is None:
            pos, quat = jnp.zeros_like(reading.obj[:, :3]), jnp.zeros_like(reading.obj[:, 3:])
            self._memory = Memory(Start(pos, quat, pos[:, 0]), pos)
        self._memory, signals = self._measure(self._memory, reading, is_first)
        return signals, reading.gripper_opening

    def _ask(self, success: Any) -> Reading:
        import torch

        agent, obj = self._env.agent, self._obj
        forces = [self._env.scene.get_pairwise_contact_forces(link, obj) for link in self._links]
        return Reading(
            tcp=self._tool.pose.raw_pose,
            obj=obj.pose.raw_pose,
            base=self._base.pose.raw_pose,
            gripper_opening=agent.robot.get_qpos()[:, -2:].sum(dim=-1),
            is_touched=(torch.linalg.norm(torch.stack(forces), dim=-1) > CONTACT_FORCE).any(dim=0),
            is_grasped=agent.is_grasping(obj),
            success=success,
        )


def measure(scene: Scene, on_top: Any, memory: Memory, reading: Reading, is_first: Array) -> tuple[Memory, Signals]:
    """Returns the signals of one environment, and what to remember for its next state.

    Args:
        scene: the task's row of the table.
        on_top: what the row's `on_top` returned for the environments.
        memory: of the state before; of no effect where `is_first`.
        reading: of the state.
        is_first: whether an episode begins with it.
    """
    obj_pos, obj_quat = reading.obj[:3], reading.obj[3:]
    tcp_pos, base_pos = reading.tcp[:3], reading.base[:3]
    begun = Start(obj_pos, obj_quat, on_top(obj_quat, reading.base[3:]))
    start = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), begun, memory.start)
    grasp_pos = scene.grasp_point(obj_pos, obj_quat, tcp_pos)
    moved, away = obj_pos - memory.obj_pos, grasp_pos - tcp_pos
    is_shifted = (moved @ moved > CONTACT_DISPLACEMENT**2) & (away @ away < CONTACT_REACH**2)
    goal_pos, goal_quat = scene.goal(start, base_pos)
    signals = Signals(
        tcp_pos=tcp_pos,
        tcp_quat=reading.tcp[3:],
        obj_pos=obj_pos,
        obj_quat=obj_quat,
        grasp_pos=grasp_pos,
        goal_pos=goal_pos,
        goal_quat=goal_quat,
        is_grasped=reading.is_grasped & ~is_first,
        is_contact=(reading.is_touched | is_shifted) & ~is_first,
        success=reading.success,
        support_z=start.obj_pos[2],
    )
    return Memory(start, obj_pos), signals
