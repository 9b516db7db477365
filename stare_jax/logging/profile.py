"""Traces of optimiser steps for TensorBoard's profiler and Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class Profiler:
    """Marks optimiser steps, and records a trace of some of them into `<directory>/profile/<phase>/`.

    The first step of a phase is left out, because compiling would hide all else. Use it in a `with`: a trace that is
    being recorded when a phase stops is closed.
    """

    def __init__(self, directory: str | Path = "", num_steps: int = 0):
        """Takes the run directory, and the number of steps to trace in every phase; 0 traces none."""
        if num_steps < 0:
            raise ValueError(f"num_steps: got {num_steps}, expected >= 0")
        self._directory, self._num_steps = Path(directory) / "profile", num_steps
        self._seen: dict[str, int] = {}
        self._is_recording = False

    @contextlib.contextmanager
    def step(self, phase: str, number: int) -> Iterator[None]:
        """Marks one optimiser step; its name in a trace is the phase's.

        Args:
            phase: name of the phase.
            number: number of the step.
        """
        import jax

        seen = self._seen.get(phase, 0)
        if self._num_steps and seen == 1 and not self._is_recording:
            jax.profiler.start_trace(self._directory / phase)
            self._is_recording = True
        with jax.profiler.StepTraceAnnotation(phase, step_num=number):
            yield
        self._seen[phase] = seen + 1
        if self._is_recording and seen == self._num_steps:
            self.close()

    def close(self) -> None:
        """Ends a trace that is being recorded."""
        import jax

        if self._is_recording:
            # The loop runs ahead of its devices. What they are given last, they finish last.
            jax.block_until_ready([jax.device_put(0, device) + 1 for device in jax.local_devices()])
            jax.profiler.stop_trace()
            self._is_recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
