"""The numbers of a training loop between two reports: metrics of its steps, time by area of work, compilations."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stare_jax.logging.clock import Clock
from stare_jax.logging.compilations import num_compilations
from stare_jax.types import Array


class Window:
    """Metrics, time and compilations between two reports. Steps that are under way are not waited for until `read`."""

    def __init__(self, phase: str, writer: Callable[..., None], *, num_steps: int):
        """Begins after `num_steps` optimiser steps of a phase; `writer` takes its numbers (`make_writer`)."""
        self.clock = Clock()
        """seconds by area of work."""
        self._phase, self._writer, self._num_steps = phase, writer, num_steps
        self._pending: list[dict[str, Array]] = []
        self._compiled: int | None = None

    def add(self, metrics: dict[str, Array]) -> None:
        """Takes the metrics of one optimiser step. What was compiled up to the first report's end does not count."""
        self._pending.append(metrics)
        if self._compiled is None:
            self._compiled = num_compilations()

    def read(self, params: Any = None) -> list[dict[str, float]]:
        """Returns the metrics that were added since the last call, on the host, once they have been found finite.

        Args:
            params: tree of arrays, looked through for values that are not finite where a metric is not.

        Raises:
            FloatingPointError: a loss or a gradient is not.
        """
        import jax  # here, so that a command that prints a line need not wait for it

        with self.clock("update"):
            updates = jax.device_get(self._pending)
        self._pending = []
        self._num_steps = check_finite(updates, phase=self._phase, num_steps=self._num_steps, params=params)
        return updates

    def write(self, number: int, metrics: Mapping[str, float], **amounts: int) -> None:
        """Writes metrics, `time/...`, `perf/<amount>_per_s` and `perf/compilations`, and starts the next window.

        Args:
            number: number of the step, or of the iteration.
            metrics: metrics of the window.
            amounts: work that was done in the window.
        """
        seconds = self.clock.seconds()
        total = sum(seconds.values())
        self._writer(
            number,
            {
                **metrics,
                **{f"time/{area}_s": value for area, value in seconds.items()},
                **{f"perf/{name}_per_s": amount / total for name, amount in amounts.items()},
                "perf/compilations": num_compilations() - self._compiled,
            },
            phase=self._phase,
        )
        self._compiled = num_compilations()
        self.clock.reset()


def check_finite(updates: Sequence[Mapping[str, float]], *, phase: str, num_steps: int, params: Any = None) -> int:
    """Stops a run whose loss or gradient is not finite; returns the number of optimiser steps after these updates.

    Args:
        updates: metrics of consecutive updates; one that was refused (`ppo/stopped`) is no step.
        phase: name of the phase; its loss is the metric `<phase>/loss`.
        num_steps: optimiser steps before them.
        params: as for `Window.read`.

    Raises:
        FloatingPointError: names phase, step, metric and host, and arrays of `params` that are not finite.
    """
    for metrics in updates:
        for name in (f"{phase}/loss", "grad/norm"):
            if not math.isfinite(metrics[name]):
                arrays = _not_finite(params)
                since = f"; not finite since: {', '.join(arrays[:3])}{', ..' * (len(arrays) > 3)}" if arrays else ""
                step = f"step {num_steps + 1} is {metrics[name]}, on host {platform.node()}"
                raise FloatingPointError(f"{phase}: {name} of {step}{since}")
        num_steps += int(1 - metrics.get("ppo/stopped", 0))
    return num_steps


def _not_finite(params: Any) -> list[str]:
    """Returns the paths of arrays with values that are not finite, among those of this host."""
    import jax

    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(params)
        if not all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards)
    ]


def reduce_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns means over updates; of metrics whose names end in `_min` or `_max` the extremes."""
    reductions = {"_min": np.min, "_max": np.max}
    return {
        name: float(reductions.get(name[-4:], np.mean)([update[name] for update in updates])) for name in updates[0]
    }
