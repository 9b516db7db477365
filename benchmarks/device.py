"""Peak rates of devices, and timing on them; shared by the benchmarks of models."""

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from stare_jax.plan.chips import CHIPS, Peak

MEASURED = "a product of 1536 x 1536 matrices and a copy of 256 MiB, measured here"


BFLOAT16_PEAKS = {
    "H200": CHIPS["H200"].peak,
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100": CHIPS["H100"].peak,
    "A100": CHIPS["A100-80"].peak,
    "TPU v4": Peak(275e12, 1.2e12),
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5e": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v6": CHIPS["v6e"].peak,
}
"""Part of a device's name, as frameworks report it -> its peak; the first that fits counts."""


def known_peak(device: str) -> Peak | None:
    """Returns the peak of a device by its name; None where it is not in the table."""
    return next((peak for name, peak in BFLOAT16_PEAKS.items() if name.lower() in device.lower()), None)


def measure(run: Callable[[], Any], repeats: int) -> list[float]:
    """Returns the seconds of each run; `run` returns when all of its work is done."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_peak(product: Callable[[], Any], size: int, copy: Callable[[], Any], num_bytes: int) -> dict[str, float]:
    """Returns what a square product of `size` and a copy of `num_bytes` reach at their fastest."""
    product(), copy()
    return {
        "flops": 2 * size**3 / min(measure(product, 5)),
        "bandwidth": 2 * num_bytes / min(measure(copy, 5)),
    }


def jax_peak(dtype: str) -> dict[str, float]:
    """Returns what JAX's device reaches, see `MEASURED`."""
    import jax  # not wanted by processes of other frameworks
    import jax.numpy as jnp

    size, num_bytes = 1536, 2**28
    a, long = jnp.ones((size, size), dtype), jnp.ones(num_bytes // 4, jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return measure_peak(
        lambda: product(a, a).block_until_ready(), size, lambda: copy(long).block_until_ready(), num_bytes
    )


@contextlib.contextmanager
def reported(errors: list[str], what: str) -> Iterator[None]:
    """Notes an error, such as memory that does not suffice, and lets the other measurements go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        errors.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def summary(seconds: list[float]) -> dict[str, float]:
    return {"min_s": min(seconds), "median_s": statistics.median(seconds), "max_s": max(seconds)}
