"""Files of safetensors: what is in them, read through memory maps, written one tensor at a time.

A file is an eight-byte length, that many bytes of JSON (name -> dtype, shape, first and last byte) and the numbers. No
other format of weights is read: a pickle can run code.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from stare_jax.config import Natural, UserError
from stare_jax.documents import DocumentError, check_record, parse_json, read_json, read_record, refuse_pointer

INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".npz")
"""endings of files that hold weights, in any format"""
_FAMILIES = (("F", "float", (64, 32, 16)), ("I", "int", (64, 32, 16, 8)), ("U", "uint", (64, 32, 16, 8)))
DTYPES = {f"{code}{bits}": f"{name}{bits}" for code, name, sizes in _FAMILIES for bits in sizes}
DTYPES |= {"BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""the format's names and NumPy's"""
CODES = {name: code for code, name in DTYPES.items()}
OnBytes = Callable[[int], None]
"""progress: called with numbers of bytes that have been read or written"""
Named = Iterable[tuple[str, np.ndarray]]
"""names and values of tensors; taken one at a time"""
_MAX_HEADER = 100 * 2**20
_ALIGNMENT = 8
_BLOCK_BYTES = 2**26


class WeightsError(UserError, ValueError):
    """Weights that are not there, damaged, or do not fit; the message names file or tensor, got and expected."""


class Spec(NamedTuple):
    """Type, as NumPy names it, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Stored(NamedTuple):
    """Place of a tensor."""

    spec: Spec
    file: Path
    offset: int = 0
    """position of its first byte in a file of safetensors"""
    load: Callable[[], np.ndarray] | None = None
    """reads it, where it is in a file of another kind"""


Specs = Mapping[str, Spec]
Tensors = Mapping[str, Stored]


def read(stored: Stored) -> np.ndarray:
    """Returns a tensor; one of safetensors as a read-only view of its file, whose pages take no memory for long."""
    if stored.load is not None:
        return stored.load()
    dtype, shape = jnp.dtype(stored.spec.dtype), stored.spec.shape
    if not math.prod(shape):  # nothing can be mapped
        return np.zeros(shape, dtype)
    return np.memmap(stored.file, dtype=dtype, mode="r", offset=stored.offset, shape=shape)


def is_same(one: Stored, other: Stored, num_rows: int = 1024) -> bool:
    """Returns whether two tensors have the same bits in the type of the first; some rows are compared at a time."""
    first, second = read(one), read(other)
    rows = (slice(start, start + num_rows) for start in range(0, len(first), num_rows))
    return first.shape == second.shape and all(
        np.array_equal(first[part].view(np.uint8), second[part].astype(first.dtype).view(np.uint8)) for part in rows
    )


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    file.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def update_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Puts fields over those of a JSON file, which need not be there."""
    write_json(file, read_json(file, optional=True) | fields)


class _Header(NamedTuple):
    """Entry of a tensor in the header of a file."""

    dtype: str
    shape: tuple[Natural, ...]
    data_offsets: tuple[Natural, Natural]


def list_file(file: Path) -> dict[str, Stored]:
    """Returns the tensors of a file; raises WeightsError or DocumentError if it is not there, truncated or damaged."""
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(stream.read(length).decode(), f"{file}: header")
    except FileNotFoundError:
        raise WeightsError(f"{file}: expected a safetensors file; there is none") from None
    except DocumentError:
        raise
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: got {error}, expected a whole safetensors file") from error
    header.pop("__metadata__", None)
    entries = check_record(dict[str, _Header], header, f"{file}: header")
    tensors = {name: _locate(file, 8 + length, name, entry) for name, entry in entries.items()}
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].spec.num_bytes)):
        if stored.offset != end:
            raise WeightsError(f"{file}: {name}: got offset {stored.offset}, expected {end}: the header is damaged")
        end += stored.spec.num_bytes
    if end != size:
        what = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise WeightsError(f"{file} {what}: got {size} bytes, expected {end}")
    return tensors


def _locate(file: Path, start: int, name: str, entry: _Header) -> Stored:
    if entry.dtype not in DTYPES:
        raise WeightsError(f"{file}: {name}: got dtype {entry.dtype!r}, expected one of {', '.join(DTYPES)}")
    spec, (begin, end) = Spec(DTYPES[entry.dtype], entry.shape), entry.data_offsets
    if end - begin != spec.num_bytes:
        raise WeightsError(f"{file}: {name}: got {end - begin} bytes for {spec}, expected {spec.num_bytes}")
    return Stored(spec, file, start + begin)


def list_model(folder: Path) -> dict[str, Stored]:
    """Returns the tensors of a model's files: those of the index, where there is one, else all `model*.safetensors`.

    Instead of a folder there may be a single file.

    Raises:
        WeightsError: there are none, they are damaged, or index and files disagree, all of which is listed.
    """
    if folder.is_file():
        return list_file(folder)
    if (folder / INDEX).exists():
        return _list_indexed(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        refuse_missing(folder, "model*.safetensors")
    tensors: dict[str, Stored] = {}
    for file in files:
        listed = list_file(file)
        if twice := sorted(tensors.keys() & listed.keys()):
            raise WeightsError(f"{file}: got {', '.join(twice)} a second time, expected every tensor once")
        tensors |= listed
    return tensors


def refuse_missing(folder: Path, expected: str) -> NoReturn:
    """Raises WeightsError for a folder without the file of weights that is expected, and names those that it has."""
    others = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    advice = "; pickles are never read: save the model with safe_serialization=True" if others else ""
    raise WeightsError(f"{folder}: got {others or 'no weights'}, expected {expected}{advice}")


class _Index(NamedTuple):
    """Index of a model in several files."""

    weight_map: dict[str, str]


def _list_indexed(folder: Path) -> dict[str, Stored]:
    where = read_record(_Index, folder / INDEX).weight_map
    named = sorted(set(where.values()))
    if outside := [name for name in named if Path(name).name != name]:
        raise WeightsError(f"{folder / INDEX}: got files {outside}, expected names of files beside it")
    there = {file.name for file in folder.glob("model*.safetensors")}
    there |= {name for name in named if (folder / name).exists()}
    problems = [f"{name} is not there" for name in named if name not in there]
    problems += [f"{name} is not in the index" for name in sorted(there) if name not in named]
    listed = {name: list_file(folder / name) for name in named if name in there}
    held = {(name, file) for file, tensors in listed.items() for name in tensors}
    indexed = {(name, file) for name, file in where.items() if file in listed}
    problems += [f"{name}: not in {file}, where the index has it" for name, file in sorted(indexed - held)]
    problems += [f"{name}: in {file}, not so in the index" for name, file in sorted(held - indexed)]
    if problems:
        raise WeightsError(f"{folder / INDEX} and the files disagree:\n  " + "\n  ".join(problems))
    return {name: listed[file][name] for name, file in where.items()}


def check_tensors(what: Any, tensors: Tensors, expected: Specs) -> None:
    """Compares names, dtypes and shapes; raises WeightsError, beginning with `what`, that lists all that differ."""
    problems = [f"missing {name} {spec}" for name, spec in expected.items() if name not in tensors]
    problems += [f"unknown {name} {stored.spec}" for name, stored in tensors.items() if name not in expected]
    both = [(name, tensors[name].spec, spec) for name, spec in expected.items() if name in tensors]
    problems += [f"{name}: got {got}, expected {spec}" for name, got, spec in both if got != spec]
    if problems:
        raise WeightsError(f"{what}: {len(problems)} tensor(s) do not fit:\n  " + "\n  ".join(problems))


def write_file(file: Path, specs: Specs, values: Named, on_bytes: OnBytes = lambda num_bytes: None) -> None:
    """Writes a new file, given specs in the order of the values, of which no more than one is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.num_bytes
        header[name] = {"dtype": CODES[spec.dtype], "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    values = iter(values)
    with file.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for expected, spec in specs.items():
            name, value = next(values)
            if (name, value.dtype.name, value.shape) != (expected, *spec):
                raise ValueError(f"{file}: got {name} {value.dtype.name}{value.shape}, expected {expected} {spec}")
            value = np.atleast_1d(value)
            num_rows = max(_BLOCK_BYTES // max(value[:1].nbytes, 1), 1)
            for start in range(0, len(value), num_rows):  # a transposed tensor is never copied as a whole
                stream.write(np.ascontiguousarray(value[start : start + num_rows]).reshape(-1).view(np.uint8).data)
            del value  # before the next one is loaded
            on_bytes(spec.num_bytes)
        stream.flush()
        os.fsync(stream.fileno())


def write_model(
    folder: Path, specs: Specs, values: Named, *, max_bytes: int | None, on_bytes: OnBytes = lambda num_bytes: None
) -> None:
    """Writes `model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index, see `write_file`.

    The tensors of one file have `max_bytes` at most, if that is given; a tensor that is larger has a file of its own.
    """
    if max_bytes is None:
        write_file(folder / "model.safetensors", specs, values, on_bytes)
        return
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(other.num_bytes for other in shards[-1].values()) + spec.num_bytes > max_bytes:
            shards.append({})
        shards[-1][name] = spec
    values, where = iter(values), {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(file, shard, values, on_bytes)
        where |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())}, "weight_map": where}
    write_json(folder / INDEX, index)
