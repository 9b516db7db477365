"""Statistics and tables of experiments that `benchmarks/cells.py` runs."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from stare_jax.evaluate.bootstrap import bootstrap_interval, interquartile_mean
from stare_jax.evaluate.intervals import Estimate


def estimate(values: np.ndarray) -> Estimate:
    """Returns the interquartile mean of the seeds `[S]` with its interval."""
    return bootstrap_interval(lambda strata: interquartile_mean(strata[0]), [values])


def compare(pairs: Sequence[tuple[np.ndarray, np.ndarray]], combine: Callable[[float, float], float]) -> Estimate:
    """Returns combine(interquartile mean of the first arm, that of the second) with its interval.

    Args:
        pairs: for each task the `[S]` of two arms, with equal seeds; seeds are drawn anew within a task.
        combine: such as a difference.
    """

    def statistic(strata):
        both = np.concatenate(strata)
        return combine(interquartile_mean(both[:, 0]), interquartile_mean(both[:, 1]))

    return bootstrap_interval(statistic, [np.stack(pair, axis=1) for pair in pairs])


def difference(a: float, b: float) -> float:
    return a - b


def ratio(a: float, b: float) -> float:
    """Returns a / b of two numbers that may be infinite; 1 where both are."""
    return 1.0 if math.isinf(a) and math.isinf(b) else a / b


def show(value: Estimate, form: str, unit: str = "") -> str:
    """Returns `.512 [.480, .540]`, with the sign of infinity where runs do not get there."""
    parts = ["∞" if math.isinf(x) else format(x, form) for x in value]
    return f"{parts[0]}{unit if parts[0] != '∞' else ''} [{parts[1]}, {parts[2]}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; the first column is aligned left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
