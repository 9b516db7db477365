"""Records through which a perturbation reaches one environment on the CPU, and what it leaves behind there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stare_jax.envs.maniskill.scenes import Scene
from stare_jax.envs.maniskill.signals import SignalReader
from stare_jax.envs.maniskill.widowx import Backdrop, Starts


class Built(NamedTuple):
    """The parts of a rebuilt scene in the first state of an episode, before anything is read or drawn."""

    env: Any
    """the unwrapped `mani_skill` environment."""
    env_id: str
    scene: Scene
    reader: SignalReader
    starts: Starts | None
    """first states of WidowX tasks; None for the others."""
    backdrop: Backdrop | None
    """photograph behind WidowX tasks that are drawn; None for the others."""
    image_shape: tuple[int, int]
    """(height, width) of the images as they are drawn."""


class Ongoing(NamedTuple):
    """The part of a perturbation that goes on during the episode."""

    see: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """(image uint8 `[H, W, 3]`, segmentation int `[H, W]`) -> image that the camera gives; None leaves it as it is."""
    before_action: Callable[[int], None] | None = None
    """called before an action is executed, with the number of actions before it; None does nothing."""


OVER = Ongoing()
"""All has been changed in the first state."""
