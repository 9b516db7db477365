"""Filters of the actions that are imitated."""

import numpy as np

from stare_jax.data.reader import Dataset
from stare_jax.data.schema import DatasetError


def idle_mask(action: np.ndarray, *, translation: float, rotation: float) -> np.ndarray:
    """Returns the actions that move nothing: small translation, small rotation, gripper command as in the step before.

    A policy that has learnt to wait gets stuck where the demonstrator waited. The first action has no command before
    it and is idle by its size alone; the step before counts even if it was idle itself.

    Args:
        action: `[N, A]`: x, y, z, then rotations (none or several), then the gripper command.
        translation: largest norm of the first three that counts as idle, in the action's own unit.
        rotation: largest norm of the rotations that counts as idle, in the action's own unit.

    Returns:
        bool `[N]`, True where the action is idle.

    Raises:
        ValueError: the action is not laid out like that.
    """
    if action.ndim != 2 or action.shape[1] < 4:
        raise ValueError(f"action: got shape {action.shape}, expected [N, A] with three translations and a gripper")
    is_small = np.linalg.norm(action[:, :3], axis=1) <= translation
    is_small &= np.linalg.norm(action[:, 3:-1], axis=1) <= rotation
    gripper = action[:, -1]
    is_unchanged = np.append(True, gripper[1:] == gripper[:-1])
    return is_small & is_unchanged


def imitation_frames(dataset: Dataset) -> np.ndarray:
    """Returns int64 `[F]`, the frames to imitate: all that have an action, except those that the manifest's
    filters leave out.

    Raises:
        DatasetError: nothing is left.
    """
    idle = dataset.manifest.filters.get("idle")
    kept = []
    for i, first in enumerate(dataset.first_frame):
        action = dataset.episode_record(i)["action"]
        is_kept = (
            np.ones(len(action), bool)
            if idle is None
            else ~idle_mask(action, translation=idle["translation"], rotation=idle["rotation"])
        )
        kept.append(first + np.flatnonzero(is_kept))
    frames = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    if not len(frames):
        raise DatasetError(f"{dataset.directory}: no frame to imitate in {dataset.num_episodes} episodes")
    return frames
