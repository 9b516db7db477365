"""One ManiSkill task on the CPU, in this process: seeds and actions in, image, state and `Signals` out.

The physics is ManiSkill's own, bit for bit. Parts that nothing here reads are left out: observation dictionaries,
rewards, textures other than colour, and most of the controller's arithmetic (see `panda_control`).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.building import make_scene
from stare_jax.envs.maniskill.built import OVER, Built
from stare_jax.envs.maniskill.panda_control import make_drive
from stare_jax.envs.maniskill.panda_lite import flatten_floor
from stare_jax.envs.maniskill.perturbations import PERTURBATIONS, episode_rng
from stare_jax.envs.maniskill.reflections import skip_reflections
from stare_jax.envs.maniskill.shrinking import shrink
from stare_jax.envs.maniskill.signals import SignalReader
from stare_jax.envs.maniskill.widowx import JITTERS, Backdrop, Starts
from stare_jax.envs.state import observed_state
from stare_jax.types import Array, Signals


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
        """Builds the scene.

        Raises:
            MissingAssetsError: the task's assets are missing.
            MissingDeviceError: images are asked for and there is no Vulkan driver.
        """
        self.config = config
        self.env, self._building = make_scene(config)
        self._starts = Starts(self.env, JITTERS[config.jitter]) if config.scene.num_starts else None
        self._ongoing, self._num_actions = OVER, 0
        self._attach()

    def reset(self, seed: int, *, reproducible: bool = False) -> Frame:
        """Starts the episode of `seed`.

        Args:
            seed: initial states are equal for equal seeds in either case.
            reproducible: rebuild the scene, which takes tens of milliseconds instead of two. Equal actions lead to
                bitwise equal states only after such a reset: PhysX carries contact caches from one episode into the
                next. (Without it the first states of a WidowX scene, in which objects settle during a reset, also
                differ by nanometres.) An episode with a perturbation begins with a rebuilt scene in either case.
        """
        name = self.config.perturbation
        options = {} if self._starts is None else self._starts.place(int(seed))
        if reproducible or name:
            with self._building():
                self.env.reset(seed=int(seed), options=options | {"reconfigure": True})
            self._attach()
        else:
            self.env.reset(seed=int(seed), options=options)
        begin = PERTURBATIONS[name].begin if name else None
        self._ongoing = begin(self._built(), episode_rng(name, int(seed))) if begin else OVER
        self._num_actions = 0
        return self._frame(self._reader.begin())

    def step(self, action: np.ndarray, *, is_drawn: bool = True) -> Frame:
        """Executes one control step with a float32 action `[A]` in the controller's units; see `executed_action`.

        Args:
            action: to execute.
            is_drawn: False leaves the image out, which takes most of the time, unless a perturbation draws random
                numbers for every image.

        Raises:
            ValueError: the action has another shape or is not finite.
        """
        action = np.array(action, np.float32)
        if action.shape != (self.config.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"action: got {action}, expected {self.config.action_dim} finite numbers")
        if self._ongoing.before_action is not None:
            self._ongoing.before_action(self._num_actions)
        self._num_actions += 1
        self._drive(executed_action(action, self.config.gripper_threshold))
        self._advance()
        return self._frame(self._reader.read(), is_drawn=is_drawn or self._ongoing.see is not None)

    def close(self) -> None:
        self._reader = self._drive = self._camera = self._sapien_scene = self._backdrop = None
        self.env.close()

    def _attach(self) -> None:
        """Looks up the parts of a newly built scene that every step needs."""
        scene = self.env.scene
        self._reader = SignalReader(self.env, self.config.scene)
        self._drive = make_drive(self.env.agent) or _drive_of_mani_skill(self.env.agent)
        self._backdrop = None
        if self.config.image_size:
            camera = self.config.scene.camera.name
            if self.config.lite_robot:
                flatten_floor(scene)
            for hidden in self.env._hidden_objects:
                hidden.hide_visual()
            self._sapien_scene = scene.sub_scenes[0]
            self._camera = scene.sensors[camera].camera._render_cameras[0]
            skip_reflections(self._sapien_scene.render_system, self._camera)
            if self._starts is not None:
                self._backdrop = Backdrop(self.env, camera, self.config.drawn_shape)

    def _built(self) -> Built:
        config = self.config
        parts = self._reader, self._starts, self._backdrop
        return Built(self.env, config.spec.env_id, config.scene, *parts, config.drawn_shape)

    def _advance(self) -> None:
        physics, reader, every = self.env.scene.px, self._reader, self.config.scene.contact_every
        for sub_step in range(self.env._sim_steps_per_control, 0, -1):
            physics.step()
            if sub_step == 1 or sub_step % every == 0 and not reader.is_touched:
                reader.look()

    def _frame(self, signals: Signals, *, is_drawn: bool = True) -> Frame:
        state = observed_state(self.config.use_state, signals, self._reader.gripper_opening())
        return Frame(self._image() if self.config.image_size and is_drawn else None, state, signals)

    def _image(self) -> np.ndarray:
        """Draws the state, and makes the image as small as policies see it."""
        return shrink(self._render(), self.config.image_shape, self.config.resize)

    def _render(self) -> np.ndarray:
        self._sapien_scene.update_render()
        self._camera.take_picture()
        image = self._camera.get_picture("Color")[..., :3]
        see = self._ongoing.see
        if self._backdrop is None and see is None:
            return image
        segmentation = self._camera.get_picture("PositionSegmentation")[..., 3]
        if self._backdrop is not None:
            image = self._backdrop.behind(image, segmentation)
        return image if see is None else see(image, segmentation)


def executed_action(action: Array, gripper_threshold: float | None) -> Array:
    """Returns the controller's input for actions float32 `[..., A]`, in the namespace of their array.

    Args:
        action: of a policy; the gripper is last.
        gripper_threshold: as in `EnvConfig`.
    """
    if gripper_threshold is None:
        return action
    xp = action.__array_namespace__()
    gripper = xp.where(action[..., -1:] > gripper_threshold, 1.0, -1.0)
    return xp.concatenate([action[..., :-1], gripper], axis=-1, dtype=xp.float32)


def _drive_of_mani_skill(agent: Any) -> Callable[[np.ndarray], None]:
    """Returns `drive(action)`, which sets the targets of the joint drives, by ManiSkill's own controller."""
    import torch

    def drive(action: np.ndarray) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array_wrap__ must accept context", DeprecationWarning)
            agent.set_action(torch.from_numpy(action[None]))

    return drive
