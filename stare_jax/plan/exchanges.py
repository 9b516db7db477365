"""Exchanges between devices in a compiled program: their kinds, sizes and places."""

import math
import re
from typing import NamedTuple

from stare_jax.plan.text import Array, Instruction, Place, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One operation; one that combines several arrays has several sizes."""

    kind: str
    sizes: tuple[int, ...]
    """elements of what one device has afterwards."""
    num_loops: int
    """loops around it in the compiled program."""
    num_written: int
    """loops around it in the program as it was written."""
    source: str
    """path of names in the program as it was written."""
    num_bytes: float = 0.0
    """bytes of the arrays that are exchanged: on one device, afterwards; of a reduce-scatter, before."""
    trips: tuple[int | None, ...] = ()
    """passes of each loop around it, the outermost first; None where the text does not say."""
    group_size: int = 1
    """devices that exchange with each other."""

    def __str__(self):
        return f"{self.kind} of {self.sizes} elements in {self.num_loops} loop(s), from {self.source or 'nowhere'}"

    @property
    def times(self) -> int:
        """Number of times it is executed; a loop whose passes are not known counts once."""
        return Place(self.trips).times

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in one of these, at least: in a ring, each passes on all but its own part."""
        if self.kind == "collective-permute":
            return self.num_bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (self.group_size - 1) / self.group_size


def read_collectives(text: str | Program) -> list[Collective]:
    """Reads the collectives of `compiled.as_text()`."""
    program = Program(text) if isinstance(text, str) else text
    found, seen = [], set()
    for name, instructions in program.computations.items():
        for place in program.places(name):
            for instruction in instructions:
                kind = instruction.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                # One that runs beside products stands in the text where it begins, where it goes on and where it ends.
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                if "async_collective_fusion_config" in instruction.line and channel:
                    if (channel.group(1), place.trips) in seen:
                        continue
                    seen.add((channel.group(1), place.trips))
                found.append(_read(instruction, kind, name, place, program.num_devices))
    return found


def _read(instruction: Instruction, kind: str, computation: str, place: Place, num_devices: int) -> Collective:
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # which a TPU's compiler writes as a sum and the choice of a part
        arrays, factor = instruction.results, 1
    else:
        arrays, factor = _received(instruction), 1
        factor = _group_size(instruction.line, num_devices) if kind == "reduce-scatter" else 1
    source = instruction.source
    return Collective(
        kind,
        tuple(array.size for array in arrays),
        len(place.trips),
        source.count("while/body"),
        source,
        factor * sum(array.num_bytes for array in arrays),
        place.trips,
        _group_size(instruction.line, num_devices),
    )


def _received(instruction: Instruction) -> tuple[Array, ...]:
    """Returns what a device has afterwards; where an exchange only begins, its operands stand before its results."""
    results = instruction.results
    if instruction.opcode == "all-gather-start":
        return results[len(results) // 2 :]
    if instruction.opcode == "collective-permute-start":
        return results[1:2]
    return results


def _group_size(line: str, num_devices: int) -> int:
    """Returns the number of devices in a group: written out, as an array of groups, or as axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed.group(1).count(",") + 1
    if array := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(array.group(1))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes.group(1))}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    return num_devices
