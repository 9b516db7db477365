"""Checksums of the files of a checkpoint: written when it is complete, compared when it is read.

`checksums.json` holds the size and the CRC-32 of every other file of the folder, by its path. A core sums 1 to 2 GB/s,
several files at a time, from memory as long as the system still has there what was written: 15 GB, a model of 7B in
bfloat16, take a few seconds in the background, and again when they are loaded. A checkpoint without the file, from an
earlier version or of a process that was killed before it, is read without a comparison.
"""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stare_jax.config import UserError
from stare_jax.documents import check_record, read_json
from stare_jax.logging import replace_text

CHECKSUM_FILE = "checksums.json"
_NUM_THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 2**20


class CheckpointError(UserError, ValueError):
    """A checkpoint that is not there, is damaged or does not fit; the message names paths, got and expected."""


def write_sums(folder: Path) -> None:
    """Writes the checksums of the files that are in a folder now."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    replace_text(folder / CHECKSUM_FILE, json.dumps(_sums(folder, names), indent=0) + "\n")


def check_sums(folder: Path, items: Iterable[str]) -> None:
    """Compares files of a folder with their checksums; without the file of these nothing is compared.

    Args:
        folder: a checkpoint.
        items: names of folders in it; the files that are in none of its folders are compared, too.

    Raises:
        CheckpointError: names a file that is missing, cut off or changed.
        DocumentError: it is the file of the checksums.
    """
    file, wanted = folder / CHECKSUM_FILE, set(items)
    expected = check_record(dict[str, tuple[int, int]], read_json(file, optional=True), str(file))
    if file.exists() and not any("/" not in name for name in expected):  # every checkpoint has files beside its items
        raise CheckpointError(f"{file}: got no checksum of a file beside it, expected some; the checkpoint is damaged")
    names = [name for name in expected if "/" not in name or name.partition("/")[0] in wanted]
    for name in names:
        path, size = folder / name, expected[name][0]
        if not path.is_file():
            raise CheckpointError(f"{path}: got no file, expected one of {size} bytes; the checkpoint is damaged")
        if (got := path.stat().st_size) != size:
            raise CheckpointError(f"{path}: got {got} bytes, expected {size}; the checkpoint is damaged")
    for name, sums in _sums(folder, names).items():
        if sums != expected[name]:
            raise CheckpointError(
                f"{folder / name}: got the checksum {sums[1]}, expected {expected[name][1]}; the checkpoint is damaged"
            )


def _sums(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Returns name -> size and CRC-32 of files."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # zlib and reading let other threads run
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
