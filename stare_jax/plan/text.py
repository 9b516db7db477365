"""Reading of a compiled program's text: its instructions, and how often each of them is executed."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLEE = re.compile(r"(\w+)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_WRAPPED = ("fusion", "custom-call")
"""operations whose computation is one step for the device"""


class Array(NamedTuple):
    """Type and shape of an array in a program's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> float:
        return self.size * itemsize(self.dtype)


class Instruction(NamedTuple):
    name: str
    opcode: str
    results: tuple[Array, ...]
    """one array, or those of a tuple, flattened."""
    operands: tuple[str, ...]
    """names of the instructions whose results it takes."""
    line: str
    """text of the instruction."""

    @property
    def source(self) -> str:
        """The path of names in the program as it was written; empty where the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found.group(1) if found else ""


class Place(NamedTuple):
    """One way from the beginning of a program to a computation: the loops around it."""

    trips: tuple[int | None, ...] = ()
    """passes of each loop, the outermost first; None where the text does not say."""
    is_fused: bool = False
    """True if it is part of one step of the device."""

    @property
    def times(self) -> int:
        """Number of times the computation is executed; a loop whose passes are not known counts once."""
        return math.prod(trip or 1 for trip in self.trips)


class Program:
    """Instructions of a compiled program by computation, and the places that each computation is called from.

    Of a conditional all branches count as executed.

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match.group(1), [])
            elif (instruction := _read_instruction(line)) is not None:
                current.append(instruction)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.num_devices = int(partitions.group(1)) if partitions else 1
        self._callers: dict[str, list[tuple[str, Instruction, str]]] = {}
        for name, instructions in self.computations.items():
            for instruction in instructions:
                for role, callee in _callees(instruction):
                    if callee in self.computations:
                        self._callers.setdefault(callee, []).append((name, instruction, role))
        self.places = functools.cache(self._places)

    def _places(self, name: str) -> tuple[Place, ...]:
        """Returns the places of a computation."""
        found = []
        for caller, instruction, role in self._callers.get(name, ()):
            trips = (self._num_trips(instruction),) if role == "body" else ()
            is_fused = instruction.opcode in _WRAPPED or role == "to_apply"
            found += [Place(place.trips + trips, place.is_fused or is_fused) for place in self.places(caller)]
        return tuple(found) or (Place(),)

    def _num_trips(self, loop: Instruction) -> int | None:
        """Returns the passes of a loop: as XLA notes them, or the number that its counter is compared with."""
        if known := _TRIPS.search(loop.line):
            return int(known.group(1))
        condition = dict(_callees(loop)).get("condition", "")
        bounds = [
            int(found.group(1))
            for instruction in self.computations.get(condition, ())
            if instruction.opcode == "constant" and (found := re.search(r"constant\((\d+)\)", instruction.line))
        ]
        return bounds[0] if len(bounds) == 1 else None

    def walk(self) -> Iterator[tuple[Instruction, dict[str, Instruction], Place]]:
        """Yields every instruction with those of its computation by name, once for each of its places."""
        for name, instructions in self.computations.items():
            by_name = {instruction.name: instruction for instruction in instructions}
            for place in self.places(name):
                for instruction in instructions:
                    yield instruction, by_name, place

    @property
    def num_unknown_loops(self) -> int:
        """Loops whose number of passes the text does not say."""
        loops = (x for instructions in self.computations.values() for x in instructions if x.opcode == "while")
        return sum(self._num_trips(loop) is None for loop in loops)

    def estimated_cycles(self) -> int | None:
        """Returns the cycles of XLA's own cost model, loops counted; None where the backend has none."""
        found = [
            int(cycles.group(1)) * place.times
            for instruction, _, place in self.walk()
            if not place.is_fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.line))
        ]
        return sum(found) if found else None


def itemsize(dtype: str) -> float:
    """Returns the bytes of a number of XLA's type, such as 2 of bf16; a pred takes one, a token none."""
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 0


def _read_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    name, kind, opcode = match.groups()
    operands = tuple(re.findall(r"%([\w.\-]+)", _inside(line, match.end())))
    return Instruction(name, opcode, _arrays(kind), operands, line)


def _arrays(kind: str) -> tuple[Array, ...]:
    shapes = _ARRAY.findall(kind)
    return tuple(Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in shapes)


def _inside(line: str, start: int) -> str:
    """Returns the text from a place behind an opening bracket to the bracket that closes it."""
    depth = 1
    for end in range(start, len(line)):
        depth += (line[end] == "(") - (line[end] == ")")
        if not depth:
            return line[start:end]
    return line[start:]


def _callees(instruction: Instruction) -> Sequence[tuple[str, str]]:
    """Returns the computations that an instruction may call, each after its role."""
    branches = _BRANCHES.findall(instruction.line)
    called = [("branch", name.strip().lstrip("%")) for names in branches for name in names.split(",")]
    return [*_CALLEE.findall(instruction.line), *called]
