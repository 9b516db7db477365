"""Batches for imitation: at step s always the same frames, so that a run is resumed by s alone."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from stare_jax.data.filters import imitation_frames
from stare_jax.data.reader import Dataset
from stare_jax.data.windows import ActionWindows
from stare_jax.sharding import pod
from stare_jax.types import Array, Observation

Tokenize = Callable[[Sequence[str], np.ndarray], tuple[np.ndarray, np.ndarray]]
"""`Policy.tokenize`."""

_IMAGE = "image/"


class ImitationBatch(NamedTuple):
    """States and the expert's actions in them."""

    observation: Observation
    """`[B, ...]`, raw, with the prompt."""
    action: Array
    """float32 `[B, A]`, the clean action, raw; with a window `[B, H, A]`, the action and those after it."""
    valid: Array
    """bool `[B]` or `[B, H]`: False beyond an episode's end, where its last action is repeated."""


class Frames(NamedTuple):
    """Decoded frames."""

    observation: Observation
    """`[F, ...]`, raw, with empty prompts."""
    action: np.ndarray
    """float32 `[F, A]`."""
    episode: np.ndarray
    """int64 `[F]`, index of the episode in the data set as it is read."""


def read_frames(dataset: Dataset, indices: np.ndarray, *, num_threads: int | None = None) -> Frames:
    """Decodes frames `[F]` of a data set, in the order of `indices`; one thread a core unless told."""
    shapes = dataset.manifest.shapes
    cameras = [name.removeprefix(_IMAGE) for name in shapes if name.startswith(_IMAGE)]
    size = len(indices)
    images = {name: np.empty((size, *shapes[_IMAGE + name]), np.uint8) for name in cameras}
    state = np.empty((size, *shapes["state"]), np.float32)
    action = np.empty((size, *shapes["action"]), np.float32)

    def fill(rows: np.ndarray) -> None:
        for row in rows:
            record = dataset.frame(int(indices[row]))
            for name in cameras:
                images[name][row] = record["images"][name]
            state[row] = record["state"]
            action[row] = record["action"]

    num_threads = num_threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(fill, np.array_split(np.arange(size), num_threads)))
    no_tokens = np.zeros((size, 0))
    observation = Observation(images, state, no_tokens.astype(np.int32), no_tokens.astype(bool))
    return Frames(observation, action, np.searchsorted(dataset.first_frame, indices, side="right") - 1)


def imitation_batches(
    dataset: Dataset,
    tokenize: Tokenize,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    with_state: bool = True,
    window: int | None = None,
    cache_mib: int = 1024,
    num_prefetched: int = 2,
) -> Iterator[ImitationBatch]:
    """Yields batches without end; every epoch goes once through all frames, in an order of its own.

    Of several processes, which have the same order, each yields its own rows of every batch (`pod.share`).

    A background thread prepares the next batches while the caller computes. If all decoded frames fit into the cache,
    they are decoded once, before the first batch.

    Args:
        dataset: the demonstrations; their frames are those of `imitation_frames`.
        tokenize: `Policy.tokenize`, which fills in the prompts.
        batch_size: B.
        seed: seed of the order, in [0, 2**32).
        start_step: number of batches to pass over, which takes no time: the step of a resumed run.
        with_state: False gives states `[B, 0]`, for policies that see none.
        window: H, actions to imitate at a time; None imitates one.
        cache_mib: memory for decoded frames, in mebibytes.
        num_prefetched: number of batches that are kept ready.
    """
    indices = imitation_frames(dataset)
    windows = None if window is None else ActionWindows(dataset, window)
    read = _cached_reader(dataset, indices) if _num_mib(dataset, len(indices)) <= cache_mib else None

    def make_batch(rows: np.ndarray) -> ImitationBatch:
        rows = pod.share(rows)
        frames = read(rows) if read else read_frames(dataset, indices[rows])
        instructions = [dataset.episodes[i].instruction for i in frames.episode]
        state = frames.observation.state if with_state else np.zeros((len(rows), 0), np.float32)
        tokens, token_mask = tokenize(instructions, state)
        observation = frames.observation._replace(state=state, tokens=tokens, token_mask=token_mask)
        if windows is None:
            return ImitationBatch(observation, frames.action, np.ones(len(rows), bool))
        return ImitationBatch(observation, *windows(indices[rows], frames.episode))

    import grain  # here: a command that only prints its help does without

    order = grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat().batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=num_prefetched)
    batches = iter(order.map(make_batch).to_iter_dataset(options))
    batches.set_state({"next_index": start_step})
    return batches


def _cached_reader(dataset: Dataset, indices: np.ndarray) -> Callable[[np.ndarray], Frames]:
    frames = read_frames(dataset, indices)

    def read(rows: np.ndarray) -> Frames:
        observation = frames.observation
        images = {name: image[rows] for name, image in observation.images.items()}
        picked = Observation(images, *(leaf[rows] for leaf in observation[1:]))
        return Frames(picked, frames.action[rows], frames.episode[rows])

    return read


def _num_mib(dataset: Dataset, num_frames: int) -> float:
    images = [shape for name, shape in dataset.manifest.shapes.items() if name.startswith(_IMAGE)]
    return num_frames * sum(int(np.prod(shape)) for shape in images) / 2**20
