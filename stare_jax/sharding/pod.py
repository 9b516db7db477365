"""One process or many: the only file that knows of processes. With one, every function is the identity.

Values go from process to process through the store of JAX's coordinator, which process 0 has, and not over devices: a
process that waits there may do so for hours, hears a signal meanwhile, and compiles nothing. All processes call the
functions below in the same order, but for `is_main`, `share`, `deal`, `own_key` and `is_stopping`.
"""

import atexit
import contextlib
import functools
import itertools
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # no public name leads to the store
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax.config import UserError
from stare_jax.sharding.mesh import AXES, AXIS_TYPES, batch_sharding, has_own_parts
from stare_jax.types import Array, PyTree

_MIN_WAIT_S, _MAX_WAIT_S, _WATCH_S, _LAST_S = 0.001, 0.05, 0.5, 10.0
_CHUNK = 2**20
_ROUNDS, _SAID = "stare_jax/rounds", "stare_jax/said"
_rounds = itertools.count()
_stopping, _failing = threading.Event(), threading.Event()


# ---- Begin and end --------------------------------------------------------------------------------------------------
def start(address: str = "", num_processes: int | None = None, process_id: int | None = None, lost_s: int = 60) -> None:
    """Joins the other processes, if flags or the environment tell of any; before anything else touches a device.

    Args:
        address: HOST:PORT of process 0, or "auto" where JAX knows how to ask the machine (a TPU slice). Empty: SLURM
            and TPU environments are recognised by their variables.
        num_processes: of all; with an address.
        process_id: of this one, from 0; with an address.
        lost_s: seconds after which a process that is not heard of is lost, and all others end.

    Raises:
        UserError: an address without number and index, or nobody answers there.
    """
    given = (num_processes, process_id)
    if address not in ("", "auto") and None in given or address in ("", "auto") and given != (None, None):
        got = f"coordinator {address!r}, num_processes {num_processes}, process_id {process_id}"
        raise UserError(f"pod: got {got}, expected HOST:PORT with both others, or none of the three")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    # Of SLURM's variables this one is there in steps alone (srun), and not where a batch script runs.
    in_step = "SLURM_STEP_NUM_NODES" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if not address and not in_step and len(hosts) < 2:
        return
    given = (None, *given) if address in ("", "auto") else (address, *given)
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=lost_s)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"pod: cannot join the other processes: {' '.join(str(error).split())}") from error
    threading.Thread(target=_watch, daemon=True).start()


@contextlib.contextmanager
def joined(*arguments: Any, agreed: type[BaseException] = UserError, **options: Any) -> Iterator[None]:
    """Runs inside what all processes do together; an error of one ends all, with its text.

    Args:
        arguments, options: as for `start`.
        agreed: kind of exception that all processes raise together, after which each may take its time.
    """
    start(*arguments, **options)
    try:
        yield
    except agreed:
        raise
    except BaseException as error:
        if num_processes() > 1:
            _fail(f"{type(error).__name__}: {error}")
        raise
    from_main(None)


def _fail(text: str) -> None:
    """Tells all processes why they end, and makes sure that this one does, whatever waits for the others."""
    _failing.set()
    with contextlib.suppress(Exception):  # of a coordinator that is gone
        if earlier := [key for key, _ in _client().key_value_dir_get(f"{_SAID}/failed")]:
            print(f"the first error is that of process {earlier[0].rsplit('/', 1)[1]}", file=sys.stderr)
        _client().key_value_set(f"{_SAID}/failed/{process_id()}", text)
    atexit.register(_leave)  # Runs before JAX's own, which waits for all processes.
    timer = threading.Timer(_LAST_S, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    """Ends this process; process 0 when the others have left, to whom JAX would give another reason."""
    deadline = time.monotonic() + _LAST_S
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_SAID}/left/{process_id()}", "", allow_overwrite=True)
        while is_main() and time.monotonic() < deadline:
            if len(_client().key_value_dir_get(f"{_SAID}/left")) == num_processes():
                break
            time.sleep(_MAX_WAIT_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _watch() -> None:
    """Listens to what other processes say while this one computes: that one has failed, or is to stop."""
    while not _failing.is_set():
        time.sleep(_WATCH_S)
        with contextlib.suppress(Exception):  # JAX itself ends the process where the coordinator is gone
            said = dict(_client().key_value_dir_get(_SAID))
            failed = [(key, text) for key, text in said.items() if "/failed/" in key]
            if failed and not _failing.is_set():
                key, text = failed[0]
                print(f"error: process {key.rsplit('/', 1)[1]}: {text}", file=sys.stderr)
                _leave()
            if any(key.endswith("/stop") for key in said):
                _stopping.set()


# ---- Who and how many -----------------------------------------------------------------------------------------------
def num_processes() -> int:
    """Returns the number of processes."""
    return distributed.global_state.num_processes or 1


def process_id() -> int:
    """Returns the number of this process, from 0."""
    return distributed.global_state.process_id or 0


def is_main() -> bool:
    """Returns whether this is process 0, which owns all files that are not parts of arrays."""
    return process_id() == 0


def share(rows: Sequence) -> Sequence:
    """Returns this process's part of something that all have: contiguous parts, equal to within one, in order."""
    number, n = len(rows), num_processes()
    return rows[number * process_id() // n : number * (process_id() + 1) // n]


def deal(number: int, block: int = 1) -> np.ndarray:
    """Returns numbers of this process's own, int `[number]`: of 0, 1, 2 .. processes take `block` each in turn."""
    i = np.arange(number)
    return (i // block * num_processes() + process_id()) * block + i % block


def own_key(key: jax.Array) -> jax.Array:
    """Returns a key of this process's own."""
    return key if num_processes() == 1 else jax.random.fold_in(key, process_id())


# ---- Values ---------------------------------------------------------------------------------------------------------
def gather(value: Any, *, on_main: bool = False) -> list[Any]:
    """Returns the values of all processes, in order; with `on_main` nothing but its own to the others.

    Args:
        value: what pickle takes; NumPy arrays and not JAX's.
        on_main: for values that are large and that process 0 alone has a use for.
    """
    if num_processes() == 1:
        return [value]
    number, own, data = next(_rounds), process_id(), pickle.dumps(value)
    chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    for i, chunk in enumerate(chunks if len(chunks) > 1 else ()):
        _client().key_value_set_bytes(f"{_ROUNDS}/{number}/rest/{own}/{i}", chunk)
    head = chunks[0] if len(chunks) == 1 else b""
    _client().key_value_set_bytes(f"{_ROUNDS}/{number}/first/{own}", len(chunks).to_bytes(4) + head)
    heads, wait_s = [], _MIN_WAIT_S
    while len(heads) < num_processes():
        heads = _client().key_value_dir_get_bytes(f"{_ROUNDS}/{number}/first")
        if len(heads) < num_processes():
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _MAX_WAIT_S)
    # Everybody is here, and so done with the round before.
    _client().key_value_delete(f"{_ROUNDS}/{number - 1}/first/{own}")
    _client().key_value_delete(f"{_ROUNDS}/{number - 1}/rest/{own}")
    if on_main and not is_main():
        return [value]
    heads = {int(key.rsplit("/", 1)[1]): head for key, head in heads}
    return [value if p == own else _read(number, p, heads[p]) for p in range(num_processes())]


def _read(number: int, process: int, head: bytes) -> Any:
    num_chunks, data = int.from_bytes(head[:4]), [head[4:]]
    if num_chunks > 1:
        first = f"{_ROUNDS}/{number}/rest/{process}"
        data = [_client().blocking_key_value_get_bytes(f"{first}/{i}", 1000 * 60) for i in range(num_chunks)]
    return pickle.loads(b"".join(data))


def from_main(value: Any) -> Any:
    """Returns the value that process 0 gives."""
    return gather(value if is_main() else None)[0]


def on_main(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a function in process 0 alone, and returns there and everywhere what it returns."""
    return from_main(call(*arguments, **options) if is_main() else None)


def agree(flag: bool) -> bool:
    """Returns whether any process says so."""
    return any(gather(bool(flag)))


def is_stopping(is_asked: bool) -> bool:
    """Returns whether this process has been asked to stop, or another one has, which is told within a second.

    Not all processes have the same answer at the same time: loops `agree` on it.
    """
    if num_processes() > 1 and is_asked and not _stopping.is_set():
        _client().key_value_set(f"{_SAID}/stop", "", allow_overwrite=True)
        _stopping.set()
    return is_asked or _stopping.is_set()


# ---- Arrays ---------------------------------------------------------------------------------------------------------
def to_mesh(rows: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch onto the mesh, cut along its leading axis: the rows of all processes, one process after another.

    Args:
        rows: leaves `[B / number of processes, ...]`, this process's rows; `check_batch_size` says which B will do.
        mesh: of all processes' devices.
    """
    sharding = batch_sharding(mesh)
    if num_processes() == 1:
        return jax.device_put(rows, sharding)
    by_host = sharding if has_own_parts(mesh) else NamedSharding(mesh, P(AXES))

    def one(x):
        shape = (len(x) * num_processes(), *np.shape(x)[1:])
        return jax.make_array_from_process_local_data(by_host, np.asarray(x), shape)

    placed = jax.tree.map(one, rows)
    return placed if by_host is sharding else _move(placed, jax.tree.map(lambda x: sharding, placed))


def own_rows(batch: Array) -> np.ndarray:
    """Returns the rows of an array on the mesh that this process gave to `to_mesh`; of one that is small."""
    if num_processes() == 1:
        return np.asarray(batch)
    return share(np.asarray(_move(batch, NamedSharding(batch.sharding.mesh, P()))))


def on_host(params: PyTree) -> PyTree:
    """Returns parameters on this process's own devices, where it computes with them and waits for nobody.

    Without a copy where a process has all of them between its devices; otherwise all processes exchange their parts.
    """
    if num_processes() == 1:
        return params
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    local = [device for device in mesh.devices.flat if device.process_index == process_id()]
    tensor = math.gcd(mesh.shape["tensor"], len(local))
    fsdp = math.gcd(mesh.shape["fsdp"], len(local) // tensor)
    if (fsdp, tensor) != (mesh.shape["fsdp"], mesh.shape["tensor"]):
        copies = Mesh(mesh.devices.reshape(-1, fsdp, tensor), AXES, AXIS_TYPES)
        params = _move(params, jax.tree.map(lambda x: NamedSharding(copies, x.sharding.spec), params))
    here = Mesh(np.array(local).reshape(-1, fsdp, tensor), AXES, AXIS_TYPES)

    def one(x):
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(here, x.sharding.spec), parts)

    return jax.tree.map(one, params)


def _move(tree: PyTree, shardings: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _mover(tuple(jax.tree.leaves(shardings)))(leaves))


@functools.lru_cache(maxsize=16)
def _mover(shardings: tuple[NamedSharding, ...]) -> Callable[[list[Array]], list[Array]]:
    return jax.jit(lambda leaves: leaves, out_shardings=list(shardings))


def _client() -> Any:
    return distributed.global_state.client
