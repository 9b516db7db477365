"""Metrics of optimiser steps that are under way on the device: read back together, checked, averaged, written."""

import jax
import numpy as np

from stare_jax.logging import Clock
from stare_jax.state.train_state import Run, check_finite
from stare_jax.train.compilations import num_compilations
from stare_jax.types import Array


class StepMetrics:
    """Collects the metrics of steps without waiting for them, until `write`."""

    def __init__(self, phase: str, run: Run, *, batch_size: int, unit: str):
        """`unit` is the plural of what a batch has `batch_size` of."""
        self.clock = Clock()
        """whose areas say where the time of the steps went"""
        self._phase, self._run, self._batch_size, self._unit = phase, run, batch_size, unit
        self._pending: list[dict[str, Array]] = []
        self._compiled: int | None = None

    def add(self, metrics: dict[str, Array]) -> None:
        """Takes what one step returned. What was compiled up to the first step does not count."""
        self._pending.append(metrics)
        if self._compiled is None:
            self._compiled = num_compilations()

    def write(self, step: int) -> tuple[int, dict[str, float]]:
        """Writes means over the steps since the last call; returns how many steps there were, and the means.

        Raises:
            FloatingPointError: the loss of one of them is not finite.
        """
        with self.clock("update"):
            pending = jax.device_get(self._pending)
        check_finite(pending, phase=self._phase, first_step=step - len(pending) + 1)
        metrics = {name: float(np.mean([m[name] for m in pending])) for name in pending[0]}
        seconds = self.clock.seconds()
        metrics |= {f"time/{area}_s": value for area, value in seconds.items()}
        metrics[f"perf/{self._unit}_per_s"] = len(pending) * self._batch_size / sum(seconds.values())
        metrics["perf/compilations"] = num_compilations() - self._compiled
        self._run.writer(step, metrics, phase=self._phase)
        self._pending, self._compiled = [], num_compilations()
        self.clock.reset()
        return len(pending), metrics
