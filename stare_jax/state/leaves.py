"""Parameters one leaf at a time, for the conversion of weights: a host need not hold a model to read or write it."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from stare_jax.state.checkpoint import (
    MAX_NAMES,
    METADATA_FILE,
    CheckpointError,
    flatten,
    leaf_by_leaf,
    nest,
    param_folders,
    step_path,
)
from stare_jax.state.train_state import num_bytes
from stare_jax.types import Array, PyTree

_GROUP_BYTES = 32 * 2**20


def leaf_loader(directory: str | Path, order: Sequence[str], *, step: int | None = None) -> Callable[[str], np.ndarray]:
    """Returns a function that loads one parameter of a checkpoint, given its path, onto the host.

    Small ones are loaded together with those that come after them, because each call of Orbax takes its time.

    Args:
        directory: checkpoints of a phase.
        order: paths, as they will probably be asked for.
        step: step of the checkpoint; None takes the latest.

    Raises:
        CheckpointError: no such checkpoint, or not all of these are in it.
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
            sizes = itertools.accumulate(num_bytes(found[other][1]) for other in together)
            group = together[: max(sum(size <= _GROUP_BYTES for size in sizes), 1)]
            # Nothing is allocated for arrays that are not written to.
            like = nest({other: np.empty(found[other][1].shape, found[other][1].dtype) for other in group})
            with _partly():
                waiting.update(flatten(ocp.load_checkpointables(folder, {"params": like})["params"]))
        return waiting.pop(name)

    return load


def save_tree(directory: str | Path, name: str, tree: PyTree) -> None:
    """Saves a tree on its own, as other programs' checkpoints have it; memory as for `save_params`.

    Args:
        directory: a folder.
        name: of a new folder in it.
        tree: arrays of any sharding.
    """
    directory = Path(directory).absolute()
    with leaf_by_leaf(tree):
        ocp.save_checkpointables(directory / f"{name}.partial", {name: tree})
    for path in (directory / f"{name}.partial").iterdir():
        path.rename(directory / path.name)
    (directory / f"{name}.partial").rmdir()


def tree_shapes(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the leaves of a tree that was saved on its own, by path, without reading them."""
    path, name = _tree_at(folder)
    stored = ocp.metadata(path, checkpointable_name=name).metadata
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(stored).items()}


def load_leaf(folder: str | Path, leaf_path: str, like: jax.ShapeDtypeStruct) -> Array:
    """Loads one leaf of a tree that was saved on its own: a NumPy array where `like` has no sharding."""
    path, name = _tree_at(folder)
    wanted = like if like.sharding is not None else np.empty(like.shape, like.dtype)  # nothing is written to it
    with _partly():
        tree = ocp.load(path, nest({leaf_path: wanted}), checkpointable_name=name)
    return jax.tree.leaves(tree)[0]


def _tree_at(folder: str | Path) -> tuple[Path, str | None]:
    """Returns how Orbax wants a tree to be named: a checkpoint of its own, or a part of one."""
    folder = Path(folder).absolute()
    return (folder, None) if (folder / METADATA_FILE).exists() else (folder.parent, folder.name)


def _partly() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context
