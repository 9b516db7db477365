"""SimplerEnv's WidowX scenes, a part of ManiSkill: their building, the first states of episodes, the background."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from stare_jax.envs.rotations import turned_about_z
from stare_jax.envs.seeds import is_for_evaluation


class Jitter(NamedTuple):
    """Largest distance between the start of an episode and an official one; it is uniform to either side."""

    position: float
    """metres along each horizontal axis, of the object and of its target"""
    yaw: float
    """radians, of the object"""


JITTERS: Mapping[str, Jitter] = MappingProxyType(
    {"none": Jitter(0.0, 0.0), "15mm-15deg": Jitter(0.015, np.deg2rad(15))}
)
"""jitters by the names that configurations and manifests use"""
JitterName = Literal[*JITTERS]


@contextlib.contextmanager
def bridge_scene() -> Iterator[None]:
    """While active, WidowX scenes can be built without ManiSkill's own observations and background.

    ManiSkill collects the objects in front of the background in one list for all environments, so that a second
    environment would show objects of the first; here each environment has its own, see `Backdrop`.
    """
    from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv

    changed = {
        (BaseBridgeEnv, "SUPPORTED_OBS_MODES"): ["none"],
        (BaseDigitalTwinEnv, "rgb_overlay_mode"): "none",
        (BaseDigitalTwinEnv, "_objects_to_remove_from_greenscreen"): [],
    }
    original = {place: getattr(*place) for place in changed}
    try:
        for place, value in changed.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in original.items():
            setattr(*place, value)


class Starts:
    """The first states of a WidowX task's episodes.

    Seeds of the evaluation start at the official places in turn. All others start at a random one of these, moved by
    the jitter, so that no episode of training begins in a state of the evaluation.
    """

    def __init__(self, env: Any, jitter: Jitter):
        """
        Args:
            env: the unwrapped `mani_skill` environment, as it was made.
            jitter: of seeds that are not for evaluation.
        """
        self._env, self.jitter = env, jitter
        self._positions = env.xyz_configs.float().numpy()
        self._quats = env.quat_configs.float().numpy()
        # The basket in the sink is part of the photograph: only the eggplant can be elsewhere.
        self._movable = [0] if env.scene_setting == "sink" else [0, 1]

    @property
    def places(self) -> np.ndarray:
        """The official places of the object, `[N, 2]`, metres along x and y."""
        return self._positions[:, 0, :2]

    @property
    def num_official(self) -> int:
        return len(self._positions) * len(self._quats)

    def place(self, seed: int) -> dict[str, Any]:
        """Prepares the episode of a seed; returns the options to reset the environment with."""
        import torch

        rng = np.random.default_rng(seed)
        is_official = is_for_evaluation(seed)
        index = seed % self.num_official if is_official else int(rng.integers(self.num_official))
        which_position, which_quat = divmod(index, len(self._quats))
        positions, quats = self._positions[which_position].copy(), self._quats[which_quat].copy()  # object and target
        if not is_official:
            shift, turn = rng.uniform(-1.0, 1.0, (2, 2)), rng.uniform(-1.0, 1.0)
            positions[self._movable, :2] += self.jitter.position * shift[self._movable]
            quats[0] = turned_about_z(quats[0], self.jitter.yaw * turn)
        # The environment is left with this start as the only one to choose.
        self._env.xyz_configs, self._env.quat_configs = torch.from_numpy(positions[None]), torch.from_numpy(quats[None])
        return {"episode_id": torch.zeros(1, dtype=torch.int64)}


class Backdrop:
    """Puts the robot and the objects of a rendered scene in front of a photograph, as SimplerEnv does."""

    def __init__(self, env: Any, camera: str, size: tuple[int, int]):
        """
        Args:
            env: the unwrapped `mani_skill` environment; a new backdrop after every reconfiguration.
            camera: the simulator's name of the camera.
            size: (height, width) of its images.
        """
        self.photograph = load_photograph(env, camera, size)
        self.is_shown = mask_of(shown_parts(env))

    def behind(self, image: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
        """Returns the image `[H, W, 3]` with the photograph where `segmentation` `[H, W]` names nothing to be shown."""
        return np.where(names_shown(self.is_shown, segmentation)[..., None], image, self.photograph)


def load_photograph(env: Any, camera: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the photograph behind a camera's images, uint8 `[H, W, 3]`, for the arguments of a `Backdrop`."""
    from PIL import Image

    with Image.open(env.rgb_overlay_paths[camera]) as photograph:
        photograph = photograph.convert("RGB")
        if photograph.size != size[::-1]:
            photograph = photograph.resize(size[::-1], Image.Resampling.BOX)
        return np.asarray(photograph)


def shown_parts(env: Any) -> list[Any]:
    """Returns the objects and links of a WidowX scene that are seen in front of the photograph."""
    shown = [env.objs[name] for name in env.objects_excluded_from_greenscreening]
    return [*shown, *env.agent.robot.get_links()]


def mask_of(parts: Sequence[Any]) -> np.ndarray:
    """Returns bool `[N]`, True at the ids that actors and links have in a segmentation; N is above all of them."""
    ids = [int(part.per_scene_id[0]) for part in parts]
    is_shown = np.zeros(max(ids) + 1, bool)
    is_shown[ids] = True
    return is_shown


def names_shown(is_shown: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """Returns bool `[H, W]`, True where a segmentation `[H, W]` names one of the parts of `mask_of`."""
    segmentation = np.minimum(segmentation, len(is_shown))  # a larger id is that of something else
    return np.append(is_shown, False)[segmentation]


def scaled_intrinsics(intrinsics: np.ndarray, native: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Returns the camera matrix `[3, 3]` that shows the whole view of a camera in images of another size.

    Another aspect ratio squeezes the view as resizing the image would.

    Args:
        intrinsics: of the camera at its native size.
        native: (height, width).
        size: (height, width).
    """
    (height, width), (native_height, native_width) = size, native
    return np.diag([width / native_width, height / native_height, 1.0]) @ intrinsics
