"""Results of finished parts that are damaged are named, and nothing of them is deleted."""

import re

import pytest
from file_kinds import IDENTITY, write_parts

from stare_jax.data.arrays import ArraysError
from stare_jax.evaluate.parts import load_parts


@pytest.mark.parametrize("name", ["episodes.npz", "film_0.npz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "cannot be read (EOFError: "),
        (lambda content: content[: len(content) // 2], "cannot be read (BadZipFile: "),
        (lambda content: content[:150] + bytes([content[150] ^ 1]) + content[151:], "cannot be read ("),
        (lambda content: None, "cannot be read (FileNotFoundError: "),
    ],
)
def test_a_damaged_part_is_named(tmp_path, name, change, message):
    write_parts(tmp_path)
    folder = tmp_path / "eval/sft.partial"
    assert load_parts(folder, IDENTITY).num_parts == 1
    content = change((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    elif name == "episodes.npz":  # nothing is done yet
        assert load_parts(folder, IDENTITY).num_parts == 0
        return
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ArraysError, match=re.escape(f"{folder / name}: {message}")):
        load_parts(folder, IDENTITY)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_part_without_one_of_its_arrays_is_named(tmp_path):
    import numpy as np

    write_parts(tmp_path)
    file = tmp_path / "eval/sft.partial/episodes.npz"
    with np.load(file) as stored:
        arrays = {name: array for name, array in stored.items() if name not in ("seed", "films")}
    np.savez(file, **arrays)
    with pytest.raises(ArraysError, match=r"cannot be read \(ValueError: no films, seed\), expected a part of an"):
        load_parts(file.parent, IDENTITY)
