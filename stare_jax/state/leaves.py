"""Parameters one leaf at a time, for the conversion of weights: a host need not hold a model to write it."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stare_jax.state import storage
from stare_jax.state.checkpoint import MAX_NAMES, param_folders, step_path
from stare_jax.state.checksums import CheckpointError

_GROUP_BYTES = 32 * 2**20


def leaf_loader(directory: str | Path, order: Sequence[str], *, step: int | None = None) -> Callable[[str], np.ndarray]:
    """Returns a function that loads one parameter of a checkpoint, given its path, onto the host.

    Small ones are loaded together with those that come after them, because each call of Orbax takes its time.

    Args:
        directory: checkpoints of a phase.
        order: paths, as they will probably be asked for.
        step: step of the checkpoint; None takes the latest.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or not all of these are in it.
    """
    path = step_path(directory, step)
    found = {name: (folder, shape) for folder, shapes in param_folders(path) for name, shape in shapes.items()}
    if missing := [name for name in order if name not in found]:
        raise CheckpointError(f"{path}: got no {', '.join(missing[:MAX_NAMES])}, expected them")
    waiting: dict[str, np.ndarray] = {}

    def load(name: str) -> np.ndarray:
        if name not in waiting:
            waiting.clear()
            folder, following = found[name][0], order[order.index(name) :]
            together = list(itertools.takewhile(lambda other: found[other][0] == folder, following))
            sizes = itertools.accumulate(storage.num_bytes(found[other][1]) for other in together)
            group = together[: max(sum(size <= _GROUP_BYTES for size in sizes), 1)]
            # Nothing is allocated for arrays that are not written to.
            like = {other: np.empty(found[other][1].shape, found[other][1].dtype) for other in group}
            loaded = storage.read(folder, {"params": storage.nest(like)}, partial=True)["params"]
            waiting.update(storage.flatten(loaded))
        return waiting.pop(name)

    return load
