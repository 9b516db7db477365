"""One ManiSkill task on the CPU, in this process: seeds and actions in, image, state and `Signals` out.

The physics is ManiSkill's own, bit for bit. What is left out is what nobody here reads: observation dictionaries,
rewards, textures other than colour, and most of the controller's arithmetic (see `panda_control`).
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.panda_control import make_drive
from stare_jax.envs.panda_lite import ensure_panda_lite, flatten_floor, lite_panda_agent
from stare_jax.envs.scenes import SCENES, Scene, SignalReader
from stare_jax.envs.vulkan import select_driver
from stare_jax.stages import TASKS
from stare_jax.types import Signals

STATE_DIMS = {"none": 0, "tcp": 3, "low_dim": 29}


@dataclass(frozen=True)
class EnvConfig:
    """A batch of simulators of one task; see `make_vec_env`."""

    env_id: str = "PushCube-v1"
    num_workers: int = 2
    """processes: as many as CPU cores, or more where few environments share one."""
    envs_per_worker: int = 8
    """environments of a process, one after another: a further one costs megabytes and milliseconds, a further process
    half a gigabyte and seconds, and the policy decides for all of them at once."""
    horizon: int = 30
    """actions an episode may take."""
    image_size: int | None = 64
    """pixels of the square image; 0 or None renders nothing and needs no graphics driver."""
    use_state: str = "none"
    """`Observation.state`: "none" `[0]`; "tcp", the tool centre point's position `[3]`; "low_dim", all that matters of
    robot, object and goal `[29]`, see `low_dim_state`."""
    control_mode: str = ""
    """a control mode of the robot; empty for the task's default."""
    lite_robot: bool = True
    """low-polygon visuals; physics is the same."""
    worker_timeout_s: float = 60.0
    """a worker that has not answered a step or a reset by then is restarted."""
    start_timeout_s: float = 300.0
    max_restarts: int = 100
    """of all workers together, before the pool gives up."""

    def __post_init__(self):
        if self.env_id not in TASKS:
            raise ValueError(f"env_id: got {self.env_id!r}, expected one of {sorted(TASKS)}")
        for name in ("num_workers", "envs_per_worker", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if (self.image_size or 0) < 0:
            raise ValueError(f"image_size: got {self.image_size}, expected pixels, or 0 for no images")
        if self.use_state not in STATE_DIMS:
            raise ValueError(f"use_state: got {self.use_state!r}, expected one of {sorted(STATE_DIMS)}")
        if self.control_mode and self.control_mode not in self.scene.action_dims:
            modes = sorted(self.scene.action_dims)
            raise ValueError(f"control_mode: got {self.control_mode!r}, expected one of {modes}")
        for name in ("worker_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected seconds > 0")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: got {self.max_restarts}, expected at least 0")

    @property
    def num_envs(self) -> int:
        return self.num_workers * self.envs_per_worker

    @property
    def scene(self) -> Scene:
        """The task's row of `SCENES`; configurations may name tasks that have no simulator here."""
        if self.env_id not in SCENES:
            raise ValueError(f"env_id: got {self.env_id!r}, expected one with a simulator: {sorted(SCENES)}")
        return SCENES[self.env_id]

    @property
    def resolved_control_mode(self) -> str:
        return self.control_mode or next(iter(self.scene.action_dims))

    @property
    def action_dim(self) -> int:
        return self.scene.action_dims[self.resolved_control_mode]

    @property
    def state_dim(self) -> int:
        return STATE_DIMS[self.use_state]


class Frame(NamedTuple):
    """One state of one environment."""

    image: np.ndarray | None
    """uint8 `[H, W, 3]`, None without rendering."""
    state: np.ndarray
    """float32 `[S]`."""
    signals: Signals


class Simulator:
    """A single environment. Call `reset` before `step`, and `close` when done."""

    def __init__(self, config: EnvConfig):
        """Builds the scene; with rendering, the process's first image takes some ten seconds on the CPU.

        Raises:
            ValueError: the task has no simulator here.
            RuntimeError: images are asked for and there is no usable Vulkan driver.
        """
        self.config = config
        backend, variant = "none", materials_without_device
        if config.image_size:
            backend, variant = select_driver(), contextlib.nullcontext
            if config.lite_robot:
                variant = functools.partial(lite_panda_agent, ensure_panda_lite())
        self._building = functools.partial(_building, variant)
        gymnasium = import_mani_skill()
        cameras = {"width": config.image_size, "height": config.image_size, "shader_pack": "minimal"}
        with self._building():
            self.env = gymnasium.make(
                config.env_id,
                num_envs=1,
                robot_uids=config.scene.robot,
                control_mode=config.resolved_control_mode,
                obs_mode="none",
                reward_mode="none",
                sim_backend="physx_cpu",
                render_backend=backend,
                sensor_configs=cameras if config.image_size else {},
                disable_env_checker=True,
            ).unwrapped
        self._attach()

    def reset(self, seed: int, *, reproducible: bool = False) -> Frame:
        """Starts the episode of `seed`.

        Args:
            seed: initial states are equal for equal seeds in either case.
            reproducible: rebuild the scene, which takes tens of milliseconds instead of two. Only then do equal actions
                lead to bitwise equal states: PhysX carries contact caches from one episode into the next.
        """
        if reproducible:
            with self._building():
                self.env.reset(seed=int(seed), options={"reconfigure": True})
            self._attach()
        else:
            self.env.reset(seed=int(seed))
        return self._frame(self._reader.begin())

    def step(self, action: np.ndarray) -> Frame:
        """Executes one control step with a float32 action `[A]` in the controller's units.

        Raises:
            ValueError: the action has another shape or is not finite.
        """
        action = np.array(action, np.float32)
        if action.shape != (self.config.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"action: got {action}, expected {self.config.action_dim} finite numbers")
        if self._drive is None:
            self._step_by_mani_skill(action)
        else:
            self._drive(action)
            for _ in range(self.env._sim_steps_per_control):
                self.env.scene.px.step()
        return self._frame(self._reader.read())

    def close(self) -> None:
        self._reader = self._drive = self._camera = self._sapien_scene = None
        self.env.close()

    def _attach(self) -> None:
        """Looks up, once per built scene, what every step needs."""
        scene = self.env.scene
        self._reader = SignalReader(self.env, self.config.scene)
        self._drive = make_drive(self.env.agent) if _has_plain_step(self.env) else None
        if self.config.image_size:
            if self.config.lite_robot:
                flatten_floor(scene)
            for hidden in self.env._hidden_objects:
                hidden.hide_visual()
            self._sapien_scene = scene.sub_scenes[0]
            self._camera = scene.sensors[self.config.scene.camera].camera._render_cameras[0]

    def _step_by_mani_skill(self, action: np.ndarray) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array_wrap__ must accept context", DeprecationWarning)
            self.env._step_action(action)

    def _frame(self, signals: Signals) -> Frame:
        state = np.zeros(0, np.float32)
        if self.config.use_state == "tcp":
            state = signals.tcp_pos
        elif self.config.use_state == "low_dim":
            state = low_dim_state(signals, self._reader.gripper_opening())
        return Frame(self._render() if self.config.image_size else None, state, signals)

    def _render(self) -> np.ndarray:
        self._sapien_scene.update_render()
        self._camera.take_picture()
        return self._camera.get_picture("Color")[..., :3]


def low_dim_state(signals: Signals, gripper_opening: float) -> np.ndarray:
    """Returns float32 `[29]`: tool (position, orientation), gripper opening, object (position, orientation), goal
    position, tool to grasp point, object to goal, is_grasped. Metres; an orientation is the first two columns of its
    rotation matrix.
    """
    parts = (
        signals.tcp_pos,
        _first_columns(signals.tcp_quat),
        [gripper_opening],
        signals.obj_pos,
        _first_columns(signals.obj_quat),
        signals.goal_pos,
        signals.grasp_pos - signals.tcp_pos,
        signals.goal_pos - signals.obj_pos,
        [signals.is_grasped],
    )
    return np.concatenate(parts, dtype=np.float32)


def _first_columns(quat: np.ndarray) -> np.ndarray:
    """Returns `[6]`, which moves smoothly with the orientation. A quaternion does not: whichever of its two signs is
    chosen flips somewhere, and w >= 0 flips where tools point down."""
    w, x, y, z = quat
    first = (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y))
    second = (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x))
    return np.array([*first, *second])


def import_mani_skill() -> Any:
    """Registers ManiSkill's tasks and returns the `gymnasium` module that makes them."""
    import gymnasium
    import mani_skill
    import mani_skill.envs  # Registers the tasks.

    mani_skill.logger.setLevel(logging.ERROR)  # It warns about the initial poses of its own tasks.
    return gymnasium


def _has_plain_step(env: Any) -> bool:
    """Says whether the task does nothing of its own between physics steps."""
    from mani_skill.envs.sapien_env import BaseEnv

    hooks = ("_before_control_step", "_before_simulation_step", "_after_simulation_step", "_after_control_step")
    return all(getattr(type(env), hook) is getattr(BaseEnv, hook) for hook in (*hooks, "_step_action"))


@contextlib.contextmanager
def _building(variant: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """While active, scenes are built in a variant, and without ManiSkill's use of a deprecated logging method."""
    with variant(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'warn' method is deprecated", DeprecationWarning)
        yield


class _Material:
    """Stands for a render material where nothing is drawn: SAPIEN's own needs a graphics device to exist."""

    def __init__(self, **properties: Any):
        self.__dict__.update(properties)

    def set_base_color(self, color: Any) -> None:
        self.base_color = color


@contextlib.contextmanager
def materials_without_device() -> Iterator[None]:
    """While active, scenes can be built on a machine without any Vulkan driver."""
    import sapien
    from sapien import pysapien

    original = sapien.render.RenderMaterial
    sapien.render.RenderMaterial = pysapien.render.RenderMaterial = _Material
    try:
        yield
    finally:
        sapien.render.RenderMaterial = pysapien.render.RenderMaterial = original
