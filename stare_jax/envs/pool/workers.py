"""A pool of CPU simulators that step together: a few processes with some environments each, arrays in shared memory."""

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from stare_jax.envs.base import EnvStep, SimulatorError
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.panda_lite import ensure_panda_lite, report_to_stderr
from stare_jax.envs.maniskill.vulkan import driver_environment
from stare_jax.envs.pool import worker
from stare_jax.types import Observation, Signals

REMEDY = "`python launch/doctor.py` checks this machine and says what to do"


class _Worker:
    """One process and the socket to it."""

    def __init__(self, config: EnvConfig, first: int, file: int):
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from stare_jax.envs.pool.worker import main; main()"]
                + [str(theirs.fileno()), str(file), str(first)],
                env=_worker_environment(),
                pass_fds=(theirs.fileno(), file),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's affair.
            )
        with contextlib.suppress(OSError):  # Whoever is gone already is found out when it does not answer.
            self.connection.send(config)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def join(self, deadline: float) -> None:
        """Waits until the process ends by itself, and kills it at `deadline` on the monotonic clock."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()


def _worker_environment() -> dict[str, str]:
    """Returns what a worker needs set before SAPIEN, PyTorch or NumPy are loaded."""
    paths = [str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return (
        os.environ | one_thread | driver_environment() | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    )


class SimulatorPool:
    """`VecEnv` of ManiSkill simulators; see `envs.base`.

    A worker that has died, or has not answered within `config.worker_timeout_s`, is killed and started anew within the
    call: `alive` is False for its environments, `num_restarts` counts it, and until they are reset their rows stay dead
    while all others go on.
    """

    def __init__(self, config: EnvConfig, *, report: Callable[[str], None] = report_to_stderr):
        """Starts all workers in parallel.

        Args:
            report: is told in single lines how the start proceeds.

        Raises:
            SimulatorError: with the worker's own traceback, where one does not start.
        """
        self.config = config
        self.env_id, self.num_envs, self.horizon = config.env_id, config.num_envs, config.horizon
        self.action_dim = config.action_dim
        self.instructions = (config.spec.instruction,) * config.num_envs
        self.num_restarts = 0
        if config.image_size and config.lite_robot:
            ensure_panda_lite(report)
        self._file = os.memfd_create("stare_jax-simulators")
        os.ftruncate(self._file, worker.shared_size(config))
        self._memory = mmap.mmap(self._file, worker.shared_size(config))
        self._slots = worker.map_slots(config, self._memory)
        self._needs_reset = np.ones(self.num_envs, bool)
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._file)
        try:
            self._start_all(report)
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Sequence[int], *, reproducible: bool = False) -> EnvStep:
        """Resets all environments.

        Raises:
            ValueError: not one seed for each environment.
        """
        if len(seeds) != self.num_envs:
            raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {self.num_envs} environments")
        return self._call(dict(enumerate(seeds)), is_stepped=np.zeros(self.num_envs, bool), reproducible=reproducible)

    def step(
        self, action: np.ndarray, reset_seeds: Mapping[int, int] | None = None, *, reproducible: bool = False
    ) -> EnvStep:
        """Resets the environments named in `reset_seeds` and steps all the others.

        Raises:
            ValueError: an action of another shape or not finite, or an index out of range.
            SimulatorError: a simulator raised.
        """
        reset_seeds = reset_seeds or {}
        if not all(0 <= i < self.num_envs for i in reset_seeds):
            raise ValueError(f"reset_seeds: got {sorted(reset_seeds)}, expected indices below {self.num_envs}")
        is_stepped = ~self._needs_reset
        is_stepped[list(reset_seeds)] = False
        action = np.asarray(action, np.float32)
        if action.shape != (self.num_envs, self.action_dim):
            raise ValueError(f"action: got shape {action.shape}, expected {(self.num_envs, self.action_dim)}")
        if not np.isfinite(action[is_stepped]).all():
            raise ValueError(f"action: got {action.tolist()}, expected finite numbers")
        self._slots.action[:] = action
        return self._call(reset_seeds, is_stepped=is_stepped, reproducible=reproducible)

    def close(self) -> None:
        """Ends all workers and gives their memory back; a second call does nothing."""
        self._finalizer()

    def _start_all(self, report: Callable[[str], None]) -> None:
        config, start = self.config, time.monotonic()
        height, width = config.image_shape
        what = f"images of {height} x {width}" if config.image_size else "no images"
        each = config.envs_per_worker
        report(f"starting {config.num_workers} x {each} simulators of {config.env_id} ({what})")
        for index in range(config.num_workers):
            self._workers.append(_Worker(config, index * each, self._file))
        for index in self._answers(range(config.num_workers), config.start_timeout_s, on_lost=self._raise_not_started):
            ready = f"process {index + 1} of {config.num_workers} is ready"
            report(f"{ready} after {time.monotonic() - start:.1f} s")

    def _call(self, seeds: Mapping[int, int], *, is_stepped: np.ndarray, reproducible: bool) -> EnvStep:
        """Sends every worker its command, waits for all, and restarts those that are lost."""
        reset = worker.RESET_REPRODUCIBLY if reproducible else worker.RESET
        commands = [worker.STEP if row else worker.STAY for row in is_stepped]
        for row, seed in seeds.items():
            commands[row] = reset + str(int(seed)).encode()
        asked = [index for index in range(len(self._workers)) if {*commands[self._rows(index)]} != {worker.STAY}]
        for index in asked:
            with contextlib.suppress(OSError):  # As above.
                self._workers[index].connection.send_bytes(worker.SEPARATOR.join(commands[self._rows(index)]))
        alive, lost = np.array(commands) != worker.STAY, []
        for _ in self._answers(asked, self.config.worker_timeout_s, on_lost=lost.append):
            pass
        for index in lost:
            alive[self._rows(index)] = False
            self._needs_reset[self._rows(index)] = True
            self._restart(index)
        self._needs_reset[alive] = False
        return self._read(alive)

    def _rows(self, index: int) -> slice:
        """The environments of a worker."""
        return slice(index * self.config.envs_per_worker, (index + 1) * self.config.envs_per_worker)

    def _answers(self, indices, timeout_s: float, *, on_lost: Callable[[int], None]):
        """Yields the indices as their workers answer; `on_lost` gets those that died or did not answer in time.

        Raises:
            SimulatorError: a worker answered with a traceback.
        """
        pending = {self._workers[i].connection: i for i in indices}
        deadline = time.monotonic() + timeout_s
        failures: dict[str, list[int]] = {}  # What went wrong -> where, so that it is said once.
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                i = pending.pop(connection)
                try:
                    answer = connection.recv_bytes()
                except (EOFError, OSError):
                    on_lost(i)
                    continue
                if answer == worker.DONE:
                    yield i
                else:
                    failures.setdefault(answer[1:].decode(), []).append(i)
        for i in pending.values():
            on_lost(i)
        if failures:
            where = {what: ", ".join(map(str, sorted(indices))) for what, indices in failures.items()}
            lines = [f"simulator process {indices} of {self.env_id}:\n{what}" for what, indices in where.items()]
            raise SimulatorError("\n".join([*lines, REMEDY]))

    def _raise_not_started(self, index: int) -> None:
        process = self._workers[index].process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        how = f"still silent after {self.config.start_timeout_s:g} s" if process.poll() is None else "ended"
        raise SimulatorError(
            f"simulator process {index} of {self.env_id} did not start: {how}, exit status {process.poll()}; {REMEDY}"
        )

    def _restart(self, index: int) -> None:
        self.num_restarts += 1
        if self.num_restarts > self.config.max_restarts:
            raise SimulatorError(
                f"max_restarts: processes of {self.env_id} were lost {self.num_restarts} times, expected at most "
                f"{self.config.max_restarts}; {REMEDY}"
            )
        self._workers[index].kill()
        self._workers[index] = _Worker(self.config, index * self.config.envs_per_worker, self._file)
        for _ in self._answers([index], self.config.start_timeout_s, on_lost=self._raise_not_started):
            pass

    def _read(self, alive: np.ndarray) -> EnvStep:
        """Copies everything: the next call overwrites the shared memory."""
        slots = self._slots
        images = {self.config.scene.camera.name: slots.image.copy()} if self.config.image_size else {}
        no_tokens = np.zeros((self.num_envs, 0), np.int32)
        observation = Observation(images, slots.state.copy(), no_tokens, no_tokens.astype(bool))
        return EnvStep(observation, Signals(*(slot.copy() for slot in slots.signals)), alive)


def _shut_down(workers: list[_Worker], file: int) -> None:
    deadline = time.monotonic() + 5.0
    for each in workers:
        with contextlib.suppress(OSError):
            each.connection.send_bytes(worker.CLOSE)
    for each in workers:
        each.join(deadline)
    os.close(file)
