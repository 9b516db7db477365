"""Checkpoints: parameters, optimiser, normalisation statistics and counters; the only file that knows Orbax.

    <directory>/<step>/{params, optimizer}  with counters and normalisation statistics as JSON in the metadata

Parameters are an item of their own, so that a policy can be loaded without the optimiser. A step whose writing was
killed is not seen by anything here and is removed when the directory is opened for writing.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from stare_jax.config import UserError
from stare_jax.sharding.mesh import path_name
from stare_jax.types import Array, NormStats, PyTree, TrainState

_MAX_NAMES = 20
_GROUP_BYTES = 32 * 2**20
_METADATA_FILE = "_CHECKPOINT_METADATA"


class CheckpointError(UserError, ValueError):
    """A checkpoint that is not there or does not fit; the message names the paths, got and expected."""


class Restored(NamedTuple):
    """What `restore` found."""

    state: TrainState
    extra: dict[str, Any]
    norm_stats: NormStats


class Checkpoints:
    """The checkpoints of one phase, newest `keep` kept; saving goes on in the background. Use it in a `with`."""

    def __init__(self, directory: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected >= 1")
        self._directory = Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            # Half deleted, or half written: Orbax writes under this name and renames at the end.
            if (path.name.isdigit() and not _is_complete(path)) or path.name.endswith(".orbax-checkpoint-tmp"):
                shutil.rmtree(path)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            # Which steps to save is the caller's choice; Orbax's own default skips some.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def save(self, step: int, state: TrainState, *, extra: dict[str, Any], norm_stats: NormStats) -> None:
        """Starts to save; returns when the arrays are copied, so that the caller may go on and donate them.

        Args:
            step: its name; a step that is there already is left as it is.
            state: arrays of any sharding.
            extra: JSON-able counters of the loop.
            norm_stats: of the policy.
        """
        if step in complete_steps(self._directory):
            return
        items = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
        }
        metadata = _custom_metadata(extra, norm_stats)
        self._checkpointer.save_checkpointables_async(step, items, custom_metadata=metadata, force=True)

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_params(
    directory: str | Path, step: int, params: PyTree, *, extra: dict[str, Any], norm_stats: NormStats
) -> None:
    """Saves parameters that no optimiser belongs to, and waits; the host holds little more than one leaf besides them.

    Args:
        directory: of checkpoints, without this step.
        step: its name.
        params: arrays of any sharding.
        extra: JSON-able, as for `Checkpoints.save`.
        norm_stats: of the policy.
    """
    with _leaf_by_leaf(params):
        path = Path(directory).absolute() / str(step)
        ocp.save_checkpointables(path, {"params": params}, custom_metadata=_custom_metadata(extra, norm_stats))


def _leaf_by_leaf(params: PyTree) -> ocp.Context:
    leaves, context = jax.tree.leaves(params), ocp.Context()
    shards = [s.data.nbytes for leaf in leaves if isinstance(leaf, jax.Array) for s in leaf.addressable_shards]
    sizes = [leaf.nbytes for leaf in leaves]
    # Without a limit Orbax collects all it writes in one transaction: a second copy of the model.
    context.memory.write_concurrent_bytes = max(shards or sizes) + 1
    context.memory.transfer_concurrent_bytes = max(sizes) + 1
    context.memory.deepcopy_host_arrays = False
    # Otherwise replicas share the writing of a leaf, and the programs that cut it do not keep the bits of a NaN.
    context.array.saving.use_replica_parallel = False
    return context


def save_tree(directory: str | Path, name: str, tree: PyTree) -> None:
    """Saves a tree on its own, as other programs' checkpoints have it; memory as for `save_params`.

    Args:
        directory: a folder.
        name: of a new folder in it.
        tree: arrays of any sharding.
    """
    directory = Path(directory).absolute()
    with _leaf_by_leaf(tree):
        ocp.save_checkpointables(directory / f"{name}.partial", {name: tree})
    for path in (directory / f"{name}.partial").iterdir():
        path.rename(directory / path.name)
    (directory / f"{name}.partial").rmdir()


def tree_shapes(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the leaves of a tree that was saved on its own, by path, without reading them."""
    path, name = _tree_at(folder)
    stored = ocp.metadata(path, checkpointable_name=name).metadata
    leaves = ((path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(stored))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves}


def load_leaf(folder: str | Path, leaf_path: str, like: jax.ShapeDtypeStruct) -> Array:
    """Loads one leaf of a tree that was saved on its own: a NumPy array where `like` has no sharding."""
    path, name = _tree_at(folder)
    wanted = like if like.sharding is not None else np.empty(like.shape, like.dtype)  # nothing is written to it
    with _partly():
        tree = ocp.load(path, _nest({leaf_path: wanted}), checkpointable_name=name)
    return jax.tree.leaves(tree)[0]


def _tree_at(folder: str | Path) -> tuple[Path, str | None]:
    """Returns how Orbax wants a tree to be named: a checkpoint of its own, or a part of one."""
    folder = Path(folder).absolute()
    return (folder, None) if (folder / _METADATA_FILE).exists() else (folder.parent, folder.name)


def _partly() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def _custom_metadata(extra: dict[str, Any], norm_stats: NormStats) -> dict[str, Any]:
    # As JSON, because Orbax refuses arrays of size zero, which the state of an image-only policy has.
    stats = {name: np.asarray(value).tolist() for name, value in norm_stats._asdict().items()}
    return {"extra": extra, "norm_stats": stats}


def complete_steps(directory: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a directory, ascending."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and _is_complete(path))


def resolve_step(directory: str | Path, step: int | None = None) -> int:
    """Returns `step`, or the latest where it is None.

    Raises:
        CheckpointError: there is no complete checkpoint of it.
    """
    steps = complete_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{directory}: got complete checkpoints of the steps {steps}, expected {wanted}")
    return steps[-1] if step is None else step


def fingerprint(directory: str | Path, *, step: int | None = None) -> str:
    """Returns what tells a checkpoint from any other, wherever its folder lies, without reading its weights.

    It is a checksum of Orbax's metadata: when the checkpoint was written, to the nanosecond, and what is in it.
    """
    metadata = (_step_path(directory, step) / _METADATA_FILE).read_bytes()
    return hashlib.sha256(metadata).hexdigest()[:12]


def restore(directory: str | Path, like: TrainState, *, step: int | None = None) -> Restored:
    """Loads a whole train state, onto whatever mesh `like` is on.

    Args:
        directory: of the phase's checkpoints.
        like: a state, or `jax.ShapeDtypeStruct`s with shardings, of the same shapes.
        step: which one; None takes the latest.

    Raises:
        CheckpointError: none there, or other paths, shapes or dtypes than `like`.
    """
    path = _step_path(directory, step)
    items = _load(path, {"params": like.params, "optimizer": {"step": like.step, "opt_state": like.opt_state}})
    optimizer = items["optimizer"]
    state = TrainState(step=optimizer["step"], params=items["params"], opt_state=optimizer["opt_state"])
    return Restored(state, load_extra(directory, step=step), load_norm_stats(directory, step=step))


def load_params(directory: str | Path, like_params: PyTree, *, step: int | None = None, cast: bool = False) -> PyTree:
    """Loads the parameters alone; arguments and errors as for `restore`, but that `cast` lets dtypes differ."""
    return _load(_step_path(directory, step), {"params": like_params}, cast=cast)["params"]


def param_shapes(directory: str | Path, *, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the parameters in a checkpoint, by path, without reading their values."""
    stored = ocp.checkpointables_metadata(_step_path(directory, step)).metadata
    leaves = jax.tree.leaves_with_path(stored["params"])
    return {path_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def leaf_loader(directory: str | Path, order: Sequence[str], *, step: int | None = None) -> Callable[[str], np.ndarray]:
    """Returns a function that loads one parameter of a checkpoint, given its path, onto the host.

    Small ones are loaded together with those that come after them, because each call of Orbax takes its time.

    Args:
        directory: as for `restore`.
        order: paths, as they will probably be asked for.
        step: as for `restore`.

    Raises:
        CheckpointError: no such checkpoint, or not all of these are in it.
    """
    folder, shapes = _step_path(directory, step), param_shapes(directory, step=step)
    if missing := [path for path in order if path not in shapes]:
        raise CheckpointError(f"{folder}: got no {', '.join(missing[:_MAX_NAMES])}, expected them")
    waiting: dict[str, np.ndarray] = {}

    def load(path: str) -> np.ndarray:
        if path not in waiting:
            waiting.clear()
            sizes = itertools.accumulate(_num_bytes(shapes[name]) for name in order[order.index(path) :])
            count = max(sum(size <= _GROUP_BYTES for size in sizes), 1)
            group = order[order.index(path) :][:count]
            # Nothing is allocated for arrays that are not written to.
            like = _nest({name: np.empty(shapes[name].shape, shapes[name].dtype) for name in group})
            with _partly():
                loaded = ocp.load_checkpointables(folder, {"params": like})["params"]
            waiting.update({path_name(key): leaf for key, leaf in jax.tree.leaves_with_path(loaded)})
        return waiting.pop(path)

    return load


def _nest(leaves: dict[str, Any]) -> PyTree:
    tree: PyTree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * jnp.dtype(leaf.dtype).itemsize


def load_norm_stats(directory: str | Path, *, step: int | None = None) -> NormStats:
    """Loads the normalisation statistics that the policy of a checkpoint was trained with."""
    stored = _metadata(directory, step)["norm_stats"]
    dtypes = {"action_mask": bool}
    return NormStats(**{name: np.asarray(value, dtypes.get(name, np.float32)) for name, value in stored.items()})


def load_extra(directory: str | Path, *, step: int | None = None) -> dict[str, Any]:
    """Loads the counters that were saved with a checkpoint."""
    return dict(_metadata(directory, step)["extra"])


def _metadata(directory: str | Path, step: int | None) -> dict[str, Any]:
    return ocp.checkpointables_metadata(_step_path(directory, step)).custom_metadata


def _is_complete(path: Path) -> bool:
    # The metadata are the first to go when a checkpoint is deleted, and say when its writing was finished.
    try:
        metadata = json.loads((path / _METADATA_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return metadata.get("commit_timestamp_nsecs") is not None


def _step_path(directory: str | Path, step: int | None) -> Path:
    return Path(directory).absolute() / str(resolve_step(directory, step))


def _load(path: Path, like: dict[str, PyTree], *, cast: bool = False) -> dict[str, PyTree]:
    stored = ocp.checkpointables_metadata(path).metadata
    if missing := sorted(set(like) - set(stored)):
        raise CheckpointError(f"{path}: got the items {sorted(stored)}, expected also {missing}")
    describe = _describe_shapes if cast else _describe
    _check(path, *(describe(tree) for tree in ({name: stored[name] for name in like}, like)))
    return ocp.load_checkpointables(path, jax.tree.map(_abstract, like))


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _check(path: Path, got: dict[str, str], expected: dict[str, str]) -> None:
    """Compares names, shapes and dtypes, because Orbax's own complaint names neither path nor shape."""
    problems = [f"{name}: not in the checkpoint" for name in expected if name not in got]
    problems += [f"{name}: only in the checkpoint" for name in got if name not in expected]
    problems += [
        f"{name}: got {got[name]}, expected {expected[name]}"
        for name in expected
        if name in got and got[name] != expected[name]
    ]
    if problems:
        more = [f"and {len(problems) - _MAX_NAMES} more"] if len(problems) > _MAX_NAMES else []
        shown = [*problems[:_MAX_NAMES], *more]
        raise CheckpointError(f"{path} does not fit:\n  " + "\n  ".join(shown))


def _describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def _describe_shapes(tree: PyTree) -> dict[str, str]:
    return {path_name(path): f"{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(tree)}
