"""Arrays in a file, whole at every moment, with checksums: NumPy's `.npz`, in which every array has a CRC-32."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.config import UserError
from stare_jax.logging import replace_bytes


class ArraysError(UserError):
    """A file of arrays that is missing or damaged; the message names it."""


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, or what NumPy makes arrays of, by name."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_bytes(file, content.getvalue())


def read_arrays(file: Path, *names: str, expected: str, advice: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, these names among them.

    Args:
        file: of `write_arrays`.
        names: names that have to be there.
        expected: what the file should be, for the message.
        advice: what to do if it is not, for the message.

    Raises:
        ArraysError: it is missing or damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = dict(stored)
        if missing := sorted(set(names) - set(arrays)):
            raise ValueError(f"no {', '.join(missing)}")
        return arrays
    except Exception as error:  # zip files, compression and arrays have no common class of errors
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ArraysError(f"{file}: cannot be read ({got}), expected {expected}; {advice}") from error
