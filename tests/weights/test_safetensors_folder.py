"""Our reader and writer of safetensors against the format's own library, and on files that are not whole."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import openvla_files
import pytest
from openvla_files import read_folder
from safetensors import safe_open
from safetensors.numpy import save_file

from stare_jax.documents import DocumentError
from stare_jax.weights.files import (
    INDEX,
    Spec,
    WeightsError,
    list_file,
    list_model,
    read,
    write_file,
    write_model,
)

SHAPES = {"b": (3, 5), "a": (7,), "empty": (0, 4), "scalar": ()}


def named(tensors):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int64", "bool", "uint8"])
def test_both_libraries_read_what_the_other_writes(tmp_path, dtype):
    tensors = openvla_files.random_bits(SHAPES, dtype) if dtype != "bool" else {"b": np.eye(3, dtype=bool)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    stored = list_file(tmp_path / "theirs.safetensors")
    assert named({name: read(tensor) for name, tensor in stored.items()}) == named(tensors)
    specs = {name: Spec(array.dtype.name, array.shape) for name, array in tensors.items()}
    write_file(tmp_path / "ours.safetensors", specs, tensors.items())
    assert read_folder(tmp_path, "ours.safetensors") == named(tensors)
    with safe_open(tmp_path / "ours.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_is_cut_into_files_of_at_most_so_many_bytes(tmp_path):
    tensors = openvla_files.random_bits({f"t{i}": (i + 1, 10) for i in range(6)}, "float32")
    specs = {name: Spec("float32", array.shape) for name, array in tensors.items()}
    written = []
    write_model(tmp_path, specs, tensors.items(), max_bytes=200, on_bytes=written.append)
    # 40, 80 | 120 | 160 | 200 | 240: what is too large for a file has one of its own.
    sizes = [sum(t.spec.num_bytes for t in list_file(f).values()) for f in sorted(tmp_path.glob("model-*"))]
    assert sizes == [120, 120, 160, 200, 240]
    assert written == [40, 80, 120, 160, 200, 240]
    assert (tmp_path / "model-00005-of-00005.safetensors").exists()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 840}
    assert index["weight_map"]["t2"] == "model-00002-of-00005.safetensors"
    assert named({name: read(tensor) for name, tensor in list_model(tmp_path).items()}) == named(tensors)


@pytest.fixture
def file(tmp_path):
    save_file(openvla_files.random_bits({"a": (4, 4), "b": (8,)}, "bfloat16"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite_header(file, change):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("size", [0, 5, 30, -3])
def test_a_truncated_file_is_named(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightsError) as error:
        list_model(file.parent)
    assert str(file) in str(error.value) and ("truncated" in str(error.value) or "header" in str(error.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["a"].update(dtype="F99"), "got dtype 'F99'"),
        (lambda header: header["a"].update(shape=[4, 5]), r"got 32 bytes for bfloat16\[4, 5\]"),
        (
            lambda header: header["a"].update(shape=[-4, -4]),
            r"a.shape\[0\]: got -4, expected greater than or equal",
        ),
        (lambda header: header["a"].update(shape=["4", 4]), r"a.shape\[0\]: got '4', expected a whole number"),
        (lambda header: header["a"].update(data_offsets=[0, 32.0]), r"a.data_offsets\[1\]: got 32.0, expected a whole"),
        (lambda header: header.update(a=None), "header: a: got null, expected an object"),
        (lambda header: header["b"].update(data_offsets=[16, 32]), "b: got offset .* expected .*the header is damaged"),
        (lambda header: header["b"].pop("dtype"), "header: b.dtype: got nothing, expected text"),
        (lambda header: header.pop("b"), "has bytes that belong to no tensor: got"),
    ],
)
def test_a_damaged_header_is_explained(file, change, message):
    rewrite_header(file, change)
    with pytest.raises((WeightsError, DocumentError), match=message):
        list_file(file)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(WeightsError, match=r"\['pytorch_model.bin'\], expected model\*.safetensors; pickles are never"):
        list_model(tmp_path)


def test_an_index_that_disagrees_with_the_files_lists_where(tmp_path):
    tensors = openvla_files.random_bits({"a": (2,), "b": (2,), "c": (2,)}, "float32")
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "model-1.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "model-2.safetensors")

    def index(**where):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))

    index(a="model-1.safetensors", b="model-1.safetensors", c="model-2.safetensors")
    assert list(list_model(tmp_path)) == ["a", "b", "c"]
    index(a="model-1.safetensors", c="model-1.safetensors", d="model-3.safetensors")
    with pytest.raises(WeightsError) as error:
        list_model(tmp_path)
    for part in (
        "model-3.safetensors is not there",
        "model-2.safetensors is not in the index",
        "c: not in model-1.safetensors, where the index has it",
        "b: in model-1.safetensors, not so in the index",
    ):
        assert part in str(error.value)
    index(a="../model-1.safetensors")
    with pytest.raises(WeightsError, match="expected names of files beside it"):
        list_model(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(DocumentError, match="weight_map: got nothing, expected an object"):
        list_model(tmp_path)
    (tmp_path / INDEX).unlink()
    assert set(list_model(tmp_path)) == {"a", "b", "c"}
    save_file({"c": tensors["c"]}, tmp_path / "model-3.safetensors")
    with pytest.raises(WeightsError, match="model-3.safetensors: got c a second time"):
        list_model(tmp_path)


def test_what_is_written_is_what_was_announced(tmp_path):
    with pytest.raises(ValueError, match="got a float32"):
        write_file(tmp_path / "x", {"a": Spec("bfloat16", (2,))}, [("a", np.zeros(2, np.float32))])
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x", {"a": Spec("float32", (2,))}, [("a", jnp.zeros(2))])
