"""The process behind some environments of the pool, forked by `envs.pool.fork_server`.

It talks to its parent over one socket, inherited by number, and exchanges arrays through one shared file without a
name. It never initialises JAX. When the parent has ended, for whatever reason, the socket closes and the worker ends.
"""

import contextlib
import faulthandler
import gc
import json
import mmap
import os
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from stare_jax.config import UserError
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.building import import_mani_skill
from stare_jax.envs.maniskill.simulator import Frame, Simulator
from stare_jax.types import SIGNAL_FLAGS, SIGNAL_SHAPES, Signals

STEP, STEP_UNSEEN, RESET, RESET_REPRODUCIBLY, STAY = b"s", b"u", b"r", b"R", b"-"
"""Commands to one environment; the seed follows a reset, and an unseen step leaves the image as it is. A message has
one command per environment and one for the spare simulator, joined."""
SEPARATOR, CLOSE = b" ", b"c"
DONE, FAILED = b"d", b"f"
"""Answers; JSON follows a failure: row -> traceback."""


class Slots(NamedTuple):
    """Arrays over the shared memory, one row an environment."""

    action: np.ndarray
    """float32 `[B, A]`, written by the parent; the workers write the other arrays."""
    image: np.ndarray
    """uint8 `[B, H, W, 3]`; H = W = 0 without rendering."""
    state: np.ndarray
    """float32 `[B, S]`."""
    signals: Signals
    """leaves `[B, ...]`."""


def _layout(config: EnvConfig) -> list[tuple[tuple[int, ...], type]]:
    """Returns shape and type of every array, in the order of `Slots` and `Signals`."""
    rows = config.num_envs
    signals = [
        ((rows, *shape), np.bool_ if name in SIGNAL_FLAGS else np.float32)
        for name, shape in SIGNAL_SHAPES._asdict().items()
    ]
    return [
        ((rows, config.action_dim), np.float32),
        ((rows, *config.image_shape, 3), np.uint8),
        ((rows, config.state_dim), np.float32),
        *signals,
    ]


_ALIGNMENT = 64


def _num_bytes(shape: tuple[int, ...], dtype: type) -> int:
    used = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-used // _ALIGNMENT) * _ALIGNMENT


def shared_size(config: EnvConfig) -> int:
    """Returns how many bytes of shared memory the arrays of all environments take."""
    return sum(_num_bytes(shape, dtype) for shape, dtype in _layout(config))


def map_slots(config: EnvConfig, memory: mmap.mmap) -> Slots:
    """Returns the arrays that lie in the shared memory."""
    arrays, offset = [], 0
    for shape, dtype in _layout(config):
        arrays.append(np.frombuffer(memory, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape))
        offset += _num_bytes(shape, dtype)
    return Slots(*arrays[:3], Signals(*arrays[3:]))


def write_frame(slots: Slots, index: int, frame: Frame) -> None:
    if frame.image is not None:
        slots.image[index] = frame.image
    slots.state[index] = frame.state
    for slot, value in zip(slots.signals, frame.signals, strict=True):
        slot[index] = value


def main(socket: int, file: int, first: int) -> None:
    """Serves some environments until the parent says so or is gone.

    Args:
        socket: descriptor of the socket to the parent.
        file: descriptor of the shared file.
        first: row of the first of the environments, which are of one task.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The parent decides when to stop.
    faulthandler.enable()
    with Connection(socket) as connection, contextlib.suppress(BrokenPipeError):  # The parent may end meanwhile.
        try:
            config, path, environment = connection.recv()
            os.environ.update(environment)
            sys.path.extend(folder for folder in path if folder not in sys.path)  # A task of one's own may lie there.
            memory = mmap.mmap(file, shared_size(config))
            os.close(file)
            simulators, spare = _start(config.of_task(config.task_index[first]))
        except EOFError:
            return
        except UserError as error:  # The message says what to do: a traceback adds nothing.
            _answer(connection, {first: str(error)})
            return
        except BaseException:  # The parent has to hear of any error.
            _answer(connection, {first: traceback.format_exc()})
            return
        _answer(connection, {})
        _serve(connection, simulators, spare, map_slots(config, memory), first)


def _answer(connection: Connection, failures: dict[int, str]) -> None:
    """Tells the parent that a command is done, or in which rows it raised."""
    connection.send_bytes(DONE if not failures else FAILED + json.dumps(failures).encode())


def read_answer(answer: bytes) -> dict[int, str]:
    """Returns the content of an answer: row -> traceback of the environments that raised, empty if none did."""
    return {} if answer == DONE else {int(row): text for row, text in json.loads(answer[1:]).items()}


def load_simulator() -> None:
    """Imports what a simulator needs, which takes seconds the first time, and holds PyTorch to one thread."""
    import torch

    warnings.filterwarnings("ignore", "__array_wrap__ must accept context", DeprecationWarning)
    torch.set_num_threads(1)
    import_mani_skill()


def _start(config: EnvConfig) -> tuple[list[Simulator], Simulator | None]:
    load_simulator()
    np.random.seed()  # A process that is forked has its parent's state, as all others have.
    gc.freeze()  # Rebuilding a scene collects garbage; without the modules' objects that takes 10 ms instead of 150.
    simulators = [Simulator(config) for _ in range(config.envs_per_worker)]
    simulators[0].reset(0)  # The first image compiles shaders, and a task that cannot be read fails here, at the start.
    return simulators, Simulator(config) if config.has_spares else None


def _serve(
    connection: Connection, simulators: list[Simulator], spare: Simulator | None, slots: Slots, first: int
) -> None:
    """Answers commands until the parent says so or is gone.

    An environment that raises does not keep the others of the process from executing their commands. Its scene is
    rebuilt in its next reset: the error may have left it in any state. An environment that is to begin the episode that
    the spare simulator has begun changes places with it.
    """
    broken: set[int] = set()
    begun: tuple[bytes, Frame | None] = STAY, None
    """the command that the spare simulator has executed, and the first state of its episode, None if it raised"""
    is_spare_broken = False
    while True:
        try:
            message = connection.recv_bytes()
            if message == CLOSE:
                return
            failures: dict[int, str] = {}
            *commands, command_of_spare = message.split(SEPARATOR)
            for row, command in enumerate(commands, first):
                if command == STAY:
                    continue
                try:
                    if _serves(begun[0], command) and begun[1] is not None and row not in broken:
                        simulators[row - first], spare = spare, simulators[row - first]
                        frame, begun = begun[1], (STAY, None)
                    else:
                        simulator = simulators[row - first]
                        frame = _execute(simulator, command, slots.action[row], is_broken=row in broken)
                    _check_finite(frame)
                    write_frame(slots, row, frame)
                except Exception:
                    failures[row] = traceback.format_exc()
                else:
                    broken.discard(row)
            broken.update(failures)
            _answer(connection, failures)
            if command_of_spare != STAY and not _serves(begun[0], command_of_spare):
                begun = command_of_spare, _begin(spare, command_of_spare, is_broken=is_spare_broken)
                is_spare_broken = begun[1] is None
        except (EOFError, OSError):
            return


def _serves(begun: bytes, command: bytes) -> bool:
    """Says whether a reset that was executed is the one asked for now, or a reproducible one with its seed."""
    return begun == command or (command[:1] == RESET and begun == RESET_REPRODUCIBLY + command[1:])


def _begin(spare: Simulator, command: bytes, *, is_broken: bool) -> Frame | None:
    """Begins an episode before it is asked for; returns None where that fails: who asks for it will hear why."""
    try:
        return _execute(spare, command, np.zeros(0, np.float32), is_broken=is_broken)
    except Exception:
        return None


def _execute(simulator: Simulator, command: bytes, action: np.ndarray, *, is_broken: bool) -> Frame:
    kind, seed = command[:1], command[1:]
    if kind in (STEP, STEP_UNSEEN):
        return simulator.step(action, is_drawn=kind == STEP)
    return simulator.reset(int(seed), reproducible=is_broken or kind == RESET_REPRODUCIBLY)


def _check_finite(frame: Frame) -> None:
    """Makes sure that the physics has not diverged.

    Raises:
        FloatingPointError: a signal or the state that policies observe is not finite.
    """
    signals = {f"signals.{name}": value for name, value in frame.signals._asdict().items()}
    for name, value in (signals | {"state": frame.state}).items():
        if not np.isfinite(value).all():
            raise FloatingPointError(f"{name}: got {value}, expected finite numbers")
