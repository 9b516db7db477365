"""Results of single episodes: success, stages, and the state in which each of them began."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from stare_jax.stages import TaskSpecs, by_task, separate, stage_mask
from stare_jax.types import Array, Signals

START_TOLERANCE = 1e-4
"""Metres, or units of a quaternion: initial states nearer than this are the same start."""


class Episodes(NamedTuple):
    """Results of `E` episodes; NumPy arrays. T is the number of states up to the horizon, K of stages."""

    seed: Array
    """int64 `[E]`."""
    start: Array
    """int32 `[E]`: index of the first episode that began in the same state, which may be this one."""
    start_hash: Array
    """str `[E]`: 12 hexadecimal digits that name the initial state, the same in every evaluation on one backend; empty
    where the episode is not valid, and in files written before there were hashes."""
    valid: Array
    """bool `[E]`: False where the episode was lost with its simulator; then no other field of the row has a meaning."""
    success_end: Array
    """bool `[E]`: success in the last state of the episode."""
    success_once: Array
    """bool `[E]`: success in some state."""
    success_at: Array
    """int32 `[E]`: first state with success, T where none."""
    grasped: Array
    """bool `[E]`: the object was held in some state."""
    contacted: Array
    """bool `[E]`: the robot touched the object at some time."""
    stage_reached: Array
    """int32 `[E]`: label of the last state, in [0, K)."""
    completed: Array
    """bool `[E, K]`."""
    entered_at: Array
    """int32 `[E, K]`: first state with the label, T where none."""
    stage_len: Array
    """int32 `[E, K]`: number of states with the label."""
    task: Array
    """int32 `[E]`: index of the task, 0 where there is one."""


def measure(
    spec: TaskSpecs, signals: Signals, valid: Array, seeds: Sequence[int], task: Array | None = None
) -> Episodes:
    """Returns the results of episodes.

    Args:
        spec: the task, or all, K stages.
        signals: leaves `[E, T, ...]`.
        valid: bool `[E, T]`, a prefix of each row.
        seeds: the E seeds.
        task: int32 `[E]`, indices of the tasks; None where there is one.
    """
    valid = np.asarray(valid)
    task = np.zeros(len(valid), np.int32) if task is None else task
    separation, masks = jax.device_get(_separate_batch(spec)(task, signals, valid))
    rows, last = np.arange(len(valid)), np.maximum(valid.sum(axis=1) - 1, 0)
    success = np.asarray(signals.success) & valid
    success_once = success.any(axis=1)
    initial = initial_states(signals)
    return Episodes(
        seed=np.asarray(seeds, np.int64),
        start=same_starts(initial),
        start_hash=hash_starts(initial, valid[:, 0]),
        valid=valid[:, 0],
        success_end=success[rows, last],
        success_once=success_once,
        success_at=np.where(success_once, success.argmax(axis=1), valid.shape[1]).astype(np.int32),
        grasped=(np.asarray(signals.is_grasped) & valid).any(axis=1),
        contacted=(np.asarray(signals.is_contact) & valid).any(axis=1),
        stage_reached=separation.stage_t[rows, last],
        completed=separation.completed,
        entered_at=separation.entered_at,
        stage_len=masks.sum(axis=-1, dtype=np.int32),
        task=task,
    )


def join_episodes(parts: Sequence[Episodes], initial: Array) -> Episodes:
    """Returns the episodes of several parts as one record.

    Args:
        parts: records of E_1, E_2 .. episodes, E in all.
        initial: float32 `[E, 22]`, `initial_states` of all of them; repeated starts are looked for among all.
    """
    joined = Episodes(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    return joined._replace(start=same_starts(initial))


def take(episodes: Episodes, rows: Array) -> Episodes:
    """Returns some of the episodes, by index or by a bool mask `[E]`."""
    return Episodes(*(np.asarray(field)[rows] for field in episodes))


def initial_states(signals: Signals) -> np.ndarray:
    """Returns poses of gripper, object and goal, and the support's height, in state 0: float32 `[E, 22]`."""
    poses = (signals.tcp_pos, signals.tcp_quat, signals.obj_pos, signals.obj_quat, signals.goal_pos)
    first = [np.asarray(field)[:, 0] for field in (*poses, signals.goal_quat, signals.support_z[..., None])]
    return np.concatenate(first, axis=-1).astype(np.float32)


def same_starts(initial: np.ndarray) -> np.ndarray:
    """Returns the index of the first row that is within `START_TOLERANCE` of each row, int32 `[E]`."""
    start = np.empty(len(initial), np.int32)
    for e, state in enumerate(initial):
        start[e] = (np.abs(initial - state).max(axis=-1) < START_TOLERANCE).argmax()
    return start


def hash_starts(initial: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Returns a hash of each initial state, rounded to `START_TOLERANCE`, str `[E]`; empty where not valid.

    The grid is moved by a third of its width, so that round numbers, which tasks are full of, do not lie on its edges,
    where noise of a nanometre would change the hash.
    """
    rounded = np.rint(initial.astype(np.float64) / START_TOLERANCE + 1 / 3).astype(np.int64)
    hashes = [
        hashlib.sha256(row.tobytes()).hexdigest()[:12] if ok else "" for row, ok in zip(rounded, valid, strict=True)
    ]
    return np.array(hashes, dtype="<U12")


@functools.lru_cache(maxsize=16)
def _separate_batch(spec: TaskSpecs) -> Callable:
    def separate_one(one, signals, valid):
        separation = separate(one, signals, valid)
        return separation, stage_mask(separation, one.num_stages, valid)

    return jax.jit(jax.vmap(by_task(spec, separate_one)))
