"""A process that has loaded ManiSkill and forks the simulators' processes: 20 ms for each, where loading takes seconds.

It is started with the first pool, serves all pools of this process, and ends with it. A forked process shares the
memory of what was loaded: about 300 MB that machines with many simulators do not hold many times.
"""

import atexit
import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import wait
from typing import NoReturn

from stare_jax.envs.maniskill.vulkan import DRIVER_VARIABLES
from stare_jax.envs.pool import worker

_NUMBER = struct.Struct("=q")
READ_AT_LOADING = ("MS_ASSET_DIR", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", *DRIVER_VARIABLES)
"""Variables that libraries read when they are loaded. The others are read later and can be set in a forked process."""
_SERVER = "from stare_jax.envs.pool.fork_server import main; main()"


class ForkedProcess:
    """A process that the server has forked. The server tells its number and, when it has ended, its exit status."""

    def __init__(self, pid: int, status: socket.socket):
        self.pid = pid
        self._status = status
        self._exit_status: int | None = None

    def send_signal(self, number: int) -> None:
        """Sends a signal; nothing happens where the process has ended."""
        if self.exit_status() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the end of the process, or of the server, without which nobody is told."""
        if self._exit_status is None and self._status.fileno() >= 0:
            wait([self._status], timeout_s)

    def exit_status(self) -> int | None:
        """Returns how the process ended, minus the signal's number if by one; None if it runs or nobody knows."""
        if self._exit_status is None and self._status.fileno() >= 0 and wait([self._status], 0.0):
            self._exit_status = _read_number(self._status)
        return self._exit_status

    def close(self) -> None:
        """Forgets the process; its exit status remains."""
        self.exit_status()
        self._status.close()


def fork(arguments: tuple[int, int, int], environment: dict[str, str], *, timeout_s: float) -> ForkedProcess:
    """Starts a process that runs `worker.main(*arguments)`, after starting the server where that has not been.

    Args:
        arguments: socket, shared file and first row, see `worker.main`; the first two are descriptors of this process.
        environment: variables of the server; another one is started where some of `READ_AT_LOADING` have changed.
        timeout_s: seconds that the server has for loading.

    Raises:
        TimeoutError: the server has not answered in time.
        ConnectionError: the server has ended without an answer.
    """
    with _lock:
        connection, file, first = arguments
        for is_last in (False, True):  # A server that somebody has killed is noticed when it is asked.
            server = _server(environment)
            ours, theirs = socket.socketpair()
            ours.settimeout(timeout_s)
            with theirs, contextlib.suppress(OSError):
                socket.send_fds(server.socket, [_NUMBER.pack(first)], [connection, file, theirs.fileno()])
            try:
                pid = _read_number(ours)
            except TimeoutError:
                ours.close()
                server.end()
                raise TimeoutError(f"the server of simulator processes is silent after {timeout_s:g} s") from None
            if pid is not None:
                ours.settimeout(None)
                return ForkedProcess(pid, ours)
            ours.close()
            status = server.end()
            if is_last:
                raise ConnectionError(f"the server of simulator processes ended, exit status {status}")
    raise AssertionError("unreachable")


class _Server:
    """The server's process and the socket on which it is asked."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(theirs.fileno())],
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's affair.
            )

    def end(self) -> int:
        """Ends the server at once, not what it has forked, and returns its exit status."""
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0)
        self.process.kill()
        return self.process.wait()


_lock = threading.Lock()
_servers: list[_Server] = []
"""The last one is asked; those before it are not, and end with what they have forked."""


def _server(environment: dict[str, str]) -> _Server:
    """Returns the server of these variables."""
    for each in _servers:
        is_other = any(each.environment.get(name) != environment.get(name) for name in READ_AT_LOADING)
        if is_other or each.process.poll() is not None:
            each.socket.close()
    _servers[:] = [each for each in _servers if each.process.poll() is None]
    if not _servers or _servers[-1].socket.fileno() < 0:
        _servers.append(_Server(environment))
    return _servers[-1]


@atexit.register
def _end_servers() -> None:
    while _servers:
        _servers.pop().end()


# ---- The server's process --------------------------------------------------------------------------------------------


def main() -> None:
    """Loads ManiSkill, and forks a process for every request until the parent has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The parent decides when to stop.
    control = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(Exception):  # Every forked process tries again, and its pool hears why it fails.
        worker.load_simulator()
    gc.collect()
    gc.freeze()  # Collections of the forked processes leave this memory alone, so that it stays shared.
    children: dict[socket.socket, tuple[int, socket.socket]] = {}
    """the end of a socket whose other end the child holds, closed when it ends -> its number, where that is told"""
    while control.fileno() >= 0 or children:
        for ready in wait([*children, *([control] if control.fileno() >= 0 else [])]):
            if ready is not control:
                with ready:
                    _tell_end(*children.pop(ready))
                continue
            message, descriptors, *_ = socket.recv_fds(control, _NUMBER.size, 3)
            if not message:  # What was forked is still told about, to a parent that lives.
                control.close()
                continue
            connection, file, status = descriptors
            status = socket.socket(fileno=status)
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                for each in (control, ours, status, *children, *(told for _, told in children.values())):
                    each.close()
                _run(connection, file, *_NUMBER.unpack(message))
            theirs.close()
            os.close(connection)
            os.close(file)
            status.send(_NUMBER.pack(pid))
            children[ours] = pid, status


def _run(connection: int, file: int, first: int) -> NoReturn:
    """Serves environments in a process that was forked, and ends it."""
    status = 1
    try:
        worker.main(connection, file, first)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell_end(pid: int, status: socket.socket) -> None:
    """Tells the parent how a process has ended."""
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with status, contextlib.suppress(OSError):  # The parent may have forgotten the process.
        status.send(_NUMBER.pack(number))


def _read_number(connection: socket.socket) -> int | None:
    """Reads a number, None if the other end was closed without one."""
    try:
        message = connection.recv(_NUMBER.size)
    except ConnectionError:
        return None
    return _NUMBER.unpack(message)[0] if len(message) == _NUMBER.size else None
