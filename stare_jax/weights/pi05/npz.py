"""PaliGemma's arrays as Google publishes them: an npz file, `params/img/...` and `params/llm/...`."""

import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from stare_jax.weights.safetensors_folder import Spec, WeightsError

_ROOTS = ("params/img/", "params/llm/")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npz(file: Path) -> bool:
    """Returns whether a file is an npz file, whatever its name."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        return bool(names) and all(name.endswith(".npy") for name in names)


def list_npz(file: Path) -> dict[str, Spec]:
    """Returns the arrays of a file without reading them.

    Raises:
        WeightsError: it is damaged, or not PaliGemma's.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            specs = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file}: got {error}, expected a whole npz file") from error
    foreign = [name for name in specs if not name.startswith(_ROOTS)]
    if foreign or not specs:
        got = ", ".join(sorted(foreign)[:5]) or "nothing"
        raise WeightsError(f"{file}: got {got}, expected PaliGemma's arrays, all under {' and '.join(_ROOTS)}")
    return specs


def _header(archive: zipfile.ZipFile, name: str) -> Spec:
    with archive.open(name) as stream:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    return Spec(_named(dtype).name, shape)


def _named(dtype: np.dtype) -> np.dtype:
    """Returns the type that is meant: NumPy's format has no name for bfloat16, and calls it two bytes of anything."""
    return jnp.dtype(jnp.bfloat16) if dtype == np.dtype("V2") else dtype


def read_npz(file: Path, name: str) -> np.ndarray:
    """Returns one array; pickles are never read."""
    with np.load(file, allow_pickle=False) as arrays:
        array = arrays[name]
    return array.view(_named(array.dtype))
