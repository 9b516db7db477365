"""Peak rates of devices from their data sheets, and the least time that work takes on them."""

import re
from typing import NamedTuple

from stare_jax.config import ConfigError

GB, GIB = 10**9, 2**30
MAX_DEVICES = 512
"""devices that a processor is made to look like, at most"""


class Peak(NamedTuple):
    """Peak rates of a device, from its data sheet, or measured with a large product and a large copy."""

    flops: float
    """Operations of dense matrix products a second, in the type of the model's weights."""
    bandwidth: float
    """Bytes a second between the device's memory and its cores."""


class Cost(NamedTuple):
    flops: float
    bytes: float

    def least_time(self, peak: Peak) -> float:
        """Seconds that it takes at least: products and memory traffic overlap at best."""
        return max(self.flops / peak.flops, self.bytes / peak.bandwidth)


class Chip(NamedTuple):
    """A device, from its data sheet."""

    peak: Peak
    """operations a second in bfloat16, and bytes of memory a second."""
    memory: float
    """bytes."""
    link: float
    """bytes a second that a device sends to the others of its slice or node, over all its links; in `CHIPS` over as
    many as it can have."""
    clock: float | None = None
    """cycles a second, where XLA estimates cycles and the clock is known."""


# Operations, memory and its rate: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the documentation of Cloud TPU, and
# NVIDIA's data sheets of the SXM modules (dense products). Links: the pages name 200, 600 and 448 GB/s a chip, of which
# one link reaches 45, 90 and 90 in one direction ("How to Scale Your Model", 2025, the source of clocks, too); the data
# sheets name NVLink in both directions together.
CHIPS = {
    "v5e": Chip(Peak(197e12, 0.819e12), 16 * GIB, 4 * 45e9, 1.5e9),
    "v5p": Chip(Peak(459e12, 2.765e12), 95 * GIB, 6 * 90e9, 1.75e9),
    "v6e": Chip(Peak(918e12, 1.64e12), 32 * GIB, 4 * 90e9),
    "A100-80": Chip(Peak(312e12, 2.039e12), 80 * GB, 600e9 / 2),
    "H100": Chip(Peak(989e12, 3.35e12), 80 * GB, 900e9 / 2),
    "H200": Chip(Peak(989e12, 4.8e12), 141 * GB, 900e9 / 2),
}
"""Name on the command line -> device."""
_MOST_LINKS = {"v5e": 4, "v5p": 6, "v6e": 4}
"""links of a chip in a slice that is large in every direction"""


class Devices(NamedTuple):
    """The devices that a plan is for; none of them need be there."""

    text: str
    """text of the command line: `v5e:4x4`, `8x80GB` or `8xH100`."""
    number: int | None
    """None where the topology says it."""
    memory: float
    """bytes of one device."""
    chip: Chip | None
    """None where only the memory is known."""


def parse_topology(text: str) -> Devices:
    """Returns the devices of a slice of TPUs, such as `v5e:4x4`.

    Raises:
        ConfigError: it is none.
    """
    kinds = [name for name in CHIPS if name.startswith("v")]
    match = re.fullmatch(r"(\w+):(\d+x\d+(x\d+)?)", text)
    if match is None or match.group(1) not in kinds:
        raise ConfigError(f"--topology: got {text!r}, expected KIND:AxB or KIND:AxBxC, KIND one of {', '.join(kinds)}")
    kind, sizes = match.group(1), [int(size) for size in match.group(2).split("x")]
    chip = CHIPS[kind]
    # One to each neighbour of a chip inside the slice; a single chip sends nothing, whatever its rate.
    num_links = max(1, min(sum(min(size - 1, 2) for size in sizes), _MOST_LINKS[kind]))
    return Devices(text, None, chip.memory, chip._replace(link=chip.link * num_links / _MOST_LINKS[kind]))


def parse_devices(text: str) -> Devices:
    """Returns a number of devices with so much memory each, `8x80GB`, or of a kind, `8xH100`.

    Raises:
        ConfigError: it is neither.
    """
    kinds = [name for name in CHIPS if not name.startswith("v")]
    match = re.fullmatch(r"(\d+)x(?:(\d+(?:\.\d+)?)GB|(.+))", text)
    number = int(match.group(1)) if match else 0
    if match is None or not 1 <= number <= MAX_DEVICES or not (match.group(2) or match.group(3) in kinds):
        expected = f"NUMBERxMEMORY such as 8x80GB, or NUMBERxKIND, KIND one of {', '.join(kinds)}"
        raise ConfigError(f"--devices: got {text!r}, expected {expected}; NUMBER 1 to {MAX_DEVICES}")
    if match.group(2):
        return Devices(text, number, float(match.group(2)) * GB, None)
    chip = CHIPS[match.group(3)]
    return Devices(text, number, chip.memory, chip)
