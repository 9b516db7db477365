"""PaliGemma's arrays as Google publishes them: an npz file, `params/img/...` and `params/llm/...`."""

import functools
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from stare_jax.weights.safetensors_folder import Spec, Stored, Tensors, WeightsError

_ROOTS = ("params/img/", "params/llm/")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npz(file: Path) -> bool:
    """Returns whether a file is an npz file, whatever its name."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        return bool(names) and all(name.endswith(".npy") for name in names)


def list_npz(file: Path) -> Tensors | None:
    """Returns the arrays of a file without reading them; None where it is no npz file.

    Raises:
        WeightsError: it is damaged, or not PaliGemma's.
    """
    if not is_npz(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            specs = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file}: got {error}, expected a whole npz file") from error
    if foreign := [name for name in specs if not name.startswith(_ROOTS)]:
        got = ", ".join(sorted(foreign)[:5])
        raise WeightsError(f"{file}: got {got}, expected PaliGemma's arrays, all under {' and '.join(_ROOTS)}")
    return {name: Stored(spec, file, load=functools.partial(_read, file, name)) for name, spec in specs.items()}


def _header(archive: zipfile.ZipFile, name: str) -> Spec:
    with archive.open(name) as stream:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    return Spec(_named(dtype).name, shape)


def _named(dtype: np.dtype) -> np.dtype:
    """Returns the type that is meant: NumPy's format has no name for bfloat16, and calls it two bytes of anything."""
    return jnp.dtype(jnp.bfloat16) if dtype == np.dtype("V2") else dtype


def _read(file: Path, name: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:  # pickles are never read
        array = arrays[name]
    return array.view(_named(array.dtype))
