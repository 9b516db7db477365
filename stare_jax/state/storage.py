"""Trees of arrays on disk; the only file that knows Orbax.

A folder holds named items, each a tree, a dict that JSON takes, and checksums. Reading and writing hold a few leaves at
a time besides the arrays themselves, where Orbax's own defaults hold a second copy of everything.
"""

import contextlib
import logging
import math
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from stare_jax.documents import DocumentError, read_json
from stare_jax.sharding import pod
from stare_jax.sharding.mesh import path_name
from stare_jax.state.checksums import CheckpointError, check_sums, write_sums
from stare_jax.types import Array, PyTree

with epy.lazy_imports():  # a quarter of what importing a run takes, also for a command that only prints its help
    import orbax.checkpoint as orbax

METADATA_FILE = "_CHECKPOINT_METADATA"
"""Name of the file that Orbax writes last into a folder."""
PARTIAL = ".orbax-checkpoint-tmp"
"""End of the name under which Orbax writes a folder, until it is complete."""
TREE_FILES = re.compile(
    r"_CHECKPOINT_METADATA|_METADATA|_sharding|manifest\.ocdbt|orbax\.checkpoint|d|array_metadatas|commit_success\.txt"
    r"|ocdbt\.process_.*"
)
"""Names of files and folders that a tree consists of."""
_READ_BYTES = 2**28
_OF_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
"""errors that damaged files make of Orbax and of NumPy"""
_WILD = "*?[\\"
"""characters that mean others in a pattern of paths"""
_NOISE = (
    # said of every leaf where a tree was copied without the file that was beside it
    *("Metadata file does not exist", "Failed to resolve handler for checkpointable"),
    *("Failed to get metadata for checkpointable", "TensorStore data files not found"),  # errors here
)
_SAID_ONCE = ("_SignalingThread.run() raised", "Handler Commit operations", "Save Finalize thread")
"""parts of what Orbax logs, with tracebacks, of an error that it raises as well"""
for _logger in (logging.getLogger("absl"), logging.getLogger()):
    _logger.addFilter(
        lambda record: not (str(record.msg).startswith(_NOISE) or any(part in str(record.msg) for part in _SAID_ONCE))
    )


def check_place(directory: Path) -> None:
    """Raises CheckpointError where a checkpoint would be lost: Orbax looks for what it has written by a pattern of its
    own path, in which some characters stand for others."""
    if found := set(_WILD) & set(str(Path(directory).absolute())):
        got = " and ".join(sorted(found))
        raise CheckpointError(f"{directory}: got {got} in the path, expected one without {' '.join(_WILD)} to write to")


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a folder that has its final name; None for one that was written to its end.

    Orbax writes under a temporary name, and this library deletes under one, so that a folder without whole metadata has
    lost them later.
    """
    if not (folder / METADATA_FILE).exists():
        return f"got no {METADATA_FILE}, which is written with every checkpoint"
    try:
        metadata = read_json(folder / METADATA_FILE)
    except DocumentError:
        return f"got a {METADATA_FILE} that is cut off or changed"
    is_whole = metadata.get("commit_timestamp_nsecs") is not None
    return None if is_whole else f"got a {METADATA_FILE} without the time of writing"


def whole_steps(directory: Path) -> list[int]:
    """Returns the numbers of the folders `<directory>/<step>` that were written to their end, ascending."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and find_damage(path) is None)


class BackgroundWriter:
    """Writes folders `<directory>/<step>` in the background, with checksums, and keeps the newest ones."""

    def __init__(self, directory: Path, *, keep: int):
        check_place(directory)
        self._directory, self._keep = directory, keep
        every_step = orbax.v1.training.save_decision_policies.FixedIntervalPolicy(1)  # the default leaves some out
        with explained(directory):  # the metadata of all steps is read
            self._checkpointer = orbax.v1.training.Checkpointer(directory, save_decision_policy=every_step)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._finishing: Future | None = None

    def write(self, step: int, items: dict[str, PyTree], metadata: dict[str, Any], best: int | None = None) -> None:
        """Returns when the arrays are copied, so that the caller may donate them; keeps `best`, however old it is."""
        self._wait()
        with _writing(self._directory / str(step)):
            saving = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=metadata, force=True)
        self._finishing = self._thread.submit(self._finish, saving, self._directory / str(step), best)

    def close(self) -> None:
        """Waits until everything is written, and frees Orbax's resources."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()
            with _writing(self._directory):
                self._checkpointer.close()
            pod.from_main(None)

    def _wait(self) -> None:
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def _finish(self, saving: Any, folder: Path, best: int | None) -> None:
        with _writing(folder):
            saving.result()
            write_sums(folder) if pod.is_main() else None
        for step in {*whole_steps(self._directory)[: -self._keep]} - {best} if pod.is_main() else ():
            # Under this name it is known to be half deleted, should the process be killed now.
            old = (self._directory / str(step)).rename(self._directory / f"{step}{PARTIAL}")
            _remove(old)


def _remove(path: Path) -> None:
    """Deletes a folder, or a link to one, which stays."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def remove_leftovers(directory: Path, names: re.Pattern) -> list[Path]:
    """Removes folders that a killed process had half written or half deleted, and returns their paths.

    Args:
        directory: folder that this process alone writes into.
        names: final names of the folders that are written there.
    """
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.name.endswith(PARTIAL) and names.fullmatch(path.name.removesuffix(PARTIAL))
    ]
    for path in found:
        _remove(path)
    return found


def write(folder: Path, items: dict[str, PyTree], metadata: dict[str, Any]) -> None:
    """Writes a new folder with checksums, and waits; raises CheckpointError where the disk does not take it."""
    with _writing(folder):
        _write(folder, items, metadata)
        pod.on_main(write_sums, folder)


def _write(folder: Path, items: dict[str, PyTree], metadata: dict[str, Any]) -> None:
    check_place(folder)
    leaves, context = jax.tree.leaves(items), orbax.v1.Context()
    shards = [s.data.nbytes for leaf in leaves if isinstance(leaf, jax.Array) for s in leaf.addressable_shards]
    sizes = [leaf.nbytes for leaf in leaves]
    # Without a limit Orbax collects all it writes in one transaction: a second copy of the model.
    context.memory.write_concurrent_bytes = max(shards or sizes) + 1
    context.memory.transfer_concurrent_bytes = max(sizes) + 1
    context.memory.deepcopy_host_arrays = False
    # Otherwise replicas share the writing of a leaf, and the programs that cut it do not keep the bits of a NaN.
    context.array.saving.use_replica_parallel = False
    with context:
        orbax.v1.save_checkpointables(folder, items, custom_metadata=metadata)


def read(folder: Path, like: dict[str, PyTree], *, partial: bool = False) -> dict[str, PyTree]:
    """Reads items of a folder.

    Args:
        folder: complete.
        like: item -> leaves with shape, dtype and sharding; NumPy arrays, which are not written to, for NumPy's.
        partial: whether items hold leaves that are not asked for.

    Raises:
        CheckpointError: the files are damaged where they have no checksums; see `check`.
    """

    def abstract(leaf):
        is_jax = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if is_jax else leaf

    with _reading(like, partial), explained(folder):
        return orbax.v1.load_checkpointables(folder, jax.tree.map(abstract, like))


def _reading(like: PyTree, partial: bool) -> "orbax.v1.Context":
    context = orbax.v1.Context()
    sizes = map(num_bytes, jax.tree.leaves(like))
    context.memory.read_concurrent_bytes = max([_READ_BYTES, *sizes]) + 1
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns errors about files into a CheckpointError of one line."""
    try:
        yield
    except _OF_DAMAGE as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be read, files in it are missing or damaged: {reason}") from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns errors of a disk, which may be full, into a CheckpointError of one line."""
    try:
        yield
    except Exception as error:  # of whatever kind the libraries below make it
        if not (isinstance(error, OSError) or "os_error_code" in str(error)):  # TensorStore's are ValueErrors
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be written: {reason}") from error


def check(folder: Path, *items: str) -> None:
    """Compares the files of items, and those beside the items, with their checksums.

    Raises:
        CheckpointError: names a file that is missing, cut off or changed.
    """
    check_sums(folder, items)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Returns the dict that was written with the items of a folder.

    Raises:
        CheckpointError: a file beside the items is damaged.
    """
    check(folder)
    with explained(folder):
        return orbax.v1.checkpointables_metadata(folder).custom_metadata or {}


def item_shapes(folder: Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns item -> path -> shape and dtype of all leaves of a folder, without reading their values.

    Raises:
        CheckpointError: a file beside the items is damaged, or one in them where there are no checksums.
    """
    check(folder)
    with explained(folder):
        items = orbax.v1.checkpointables_metadata(folder).metadata
        if damaged := [name for name, tree in items.items() if tree is None]:
            raise ValueError(f"{', '.join(damaged)}: got no list of what is in it")
        return {name: _shapes(tree) for name, tree in items.items()}


def is_tree(folder: Path) -> bool:
    """Says whether a folder is a tree that was saved on its own."""
    return (folder / "_METADATA").is_file()


def tree_shapes(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the leaves of a tree that was saved on its own, by path, without reading them.

    Raises CheckpointError where it is damaged, as `load_leaf` does.
    """
    path, name = _tree_at(folder)
    with explained(Path(folder)):
        return _shapes(orbax.v1.metadata(path, checkpointable_name=name).metadata)


def load_leaf(folder: str | Path, leaf_path: str, like: jax.ShapeDtypeStruct) -> Array:
    """Loads one leaf of a tree that was saved on its own: a NumPy array where `like` has no sharding."""
    path, name = _tree_at(folder)
    wanted = like if like.sharding is not None else np.empty(like.shape, like.dtype)  # nothing is written to it
    with _reading(like, partial=True), explained(Path(folder)):
        tree = orbax.v1.load(path, nest({leaf_path: wanted}), checkpointable_name=name)
    return jax.tree.leaves(tree)[0]


def save_tree(
    directory: Path, name: str, leaves: Iterable[tuple[str, np.ndarray]], on_bytes: Callable[[int], None]
) -> None:
    """Saves a tree on its own, as other programs' checkpoints have it.

    Orbax wants it whole, so that it lies in files meanwhile, which take no memory.

    Args:
        directory: a folder.
        name: name of a new folder in it.
        leaves: paths and values, taken one at a time.
        on_bytes: called with the size of each.
    """
    partial, scratch = (Path(directory).absolute() / f"{name}.{end}" for end in ("partial", "leaves"))
    cpu, mapped = jax.local_devices(backend="cpu")[0], {}
    scratch.mkdir()
    for path, value in leaves:  # not enumerated: that would keep a value while the next one is loaded
        leaf, file = np.ascontiguousarray(value), scratch / str(len(mapped))
        leaf.reshape(-1).view(np.uint8).tofile(file)
        mapped[path] = jax.device_put(np.memmap(file, leaf.dtype, "r", shape=leaf.shape), cpu)  # without a copy
        on_bytes(leaf.nbytes)
        del value, leaf  # before the next one is loaded
    with _writing(partial):
        _write(partial, {name: nest(mapped)}, {})
    shutil.rmtree(scratch)
    for path in partial.iterdir():
        path.rename(partial.parent / path.name)
    partial.rmdir()


def _tree_at(folder: str | Path) -> tuple[Path, str | None]:
    """Returns how Orbax wants a tree to be named: a checkpoint of its own, or a part of one."""
    folder = Path(folder).absolute()
    return (folder, None) if (folder / METADATA_FILE).exists() else (folder.parent, folder.name)


def _shapes(stored: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(stored).items()}


def num_bytes(tree: PyTree, *, on_device: bool = False) -> int:
    """Returns the size of the arrays of a tree, or of `jax.ShapeDtypeStruct`s, in bytes; or that on each device."""

    def size(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if on_device else leaf.shape
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(leaves: dict[str, Any]) -> PyTree:
    """Returns a nested dict of leaves given by path; the inverse of `flatten`."""
    tree: PyTree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
