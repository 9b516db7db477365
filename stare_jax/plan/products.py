"""Matrix products and convolutions in a compiled program: operations and bytes, loops counted."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from stare_jax.plan.text import Array, Instruction, Program, itemsize


class Product(NamedTuple):
    """A product of one device, and how often it is executed."""

    flops: float
    """operations of one execution: two for a multiplication and an addition."""
    num_bytes: float
    """bytes of both factors and of the result."""
    times: int
    source: str
    """path of names in the program as it was written."""


def read_products(text: str | Program, *, widest: float = 8.0) -> list[Product]:
    """Reads the products of `compiled.as_text()`. Those inside a library's kernels, such as cuDNN's, are not seen.

    Args:
        text: of the program.
        widest: bytes of a number at most, for compilers that widen what the device would not.
    """
    program = Program(text) if isinstance(text, str) else text
    found = []
    for instruction, by_name, place in program.walk():
        count = {"dot": _dot_flops, "convolution": _convolution_flops}.get(instruction.opcode)
        if count is None:
            continue
        factors = [by_name[name].results[0] for name in instruction.operands[:2]]
        arrays = (*factors, instruction.results[0])
        num_bytes = sum(array.size * min(itemsize(array.dtype), widest) for array in arrays)
        found.append(Product(count(instruction, factors), num_bytes, place.times, instruction.source))
    return found


def _dot_flops(instruction: Instruction, factors: Sequence[Array]) -> float:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.line)
    summed = math.prod(factors[0].shape[int(axis)] for axis in axes.group(1).split(",") if axis) if axes else 1
    return 2.0 * instruction.results[0].size * summed


def _convolution_flops(instruction: Instruction, factors: Sequence[Array]) -> float:
    """Counts a convolution, which products with a batch are on a TPU: only where the window lies on numbers."""
    line, out = instruction.line, instruction.results[0]
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line).groups()
    window = re.search(r"window=\{([^}]*)\}", line)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    taps = 1
    for number, label in enumerate(sorted(set(kernel) - set("io"))):
        taps *= _num_taps(
            factors[0].shape[inputs.index(label)],
            out.shape[output.index(label)],
            **{name: values.split("x")[number] for name, values in fields.items()},
        )
    groups = re.search(r"batch_group_count=(\d+)", line)
    # The kernel's input features are those of one group already.
    channels = factors[1].shape[kernel.index("i")] * out.shape[output.index("f")]
    batch = factors[0].shape[inputs.index("b")] / (int(groups.group(1)) if groups else 1)
    return 2.0 * taps * channels * batch


def _num_taps(
    length: int,
    length_out: int,
    *,
    size: str,
    stride: str = "1",
    pad: str = "0_0",
    lhs_dilate: str = "1",
    rhs_dilate: str = "1",
    rhs_reversal: str = "0",
) -> int:
    """Returns the pairs of a place of the window and a place in it that lie on a number along one axis."""
    del rhs_reversal
    low, spread, hole = int(pad.split("_")[0]), int(lhs_dilate), int(rhs_dilate)
    last = (length - 1) * spread
    places = itertools.product(range(length_out), range(int(size)))
    found = (out * int(stride) + tap * hole - low for out, tap in places)
    return sum(0 <= place <= last and place % spread == 0 for place in found)
