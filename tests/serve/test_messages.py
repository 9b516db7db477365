"""openpi's messages: bytes as its client makes them, and bytes that nobody should send."""

import msgpack
import numpy as np
import pytest

from stare_jax.serve.messages import MessageError, pack, unpack


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64", "bool", "<U5"])
def test_arrays_come_back_as_they_were(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    back = unpack(pack({"a": array, "b": [array[0, 0, 0], "text", 1.5, None]}))
    assert back["a"].dtype == array.dtype
    np.testing.assert_array_equal(back["a"], array)
    assert back["b"] == [array[0, 0, 0], "text", 1.5, None]
    transposed = array.transpose(2, 0, 1)
    np.testing.assert_array_equal(unpack(pack(transposed)), transposed)


def test_bytes_are_those_of_openpis_client():
    """openpi-client 0.1.2: a map with keys of bytes; the shape is an array, the type a text."""
    expected = {b"__ndarray__": True, b"data": b"\x01\x02", b"dtype": "|u1", b"shape": [1, 2]}
    assert msgpack.unpackb(pack(np.array([[1, 2]], np.uint8)), strict_map_key=False) == expected
    expected = {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}
    assert msgpack.unpackb(pack(np.float32(1.5)), strict_map_key=False) == expected


def array(**changes):
    return msgpack.packb({b"__ndarray__": True, b"data": b"abcd", b"dtype": "<f4", b"shape": [1], **changes})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "got 0 bytes that are no msgpack"),
        (b"\xc1", "no msgpack"),
        (pack([1, 2])[:-1], "no msgpack"),
        (pack(1) + pack(2), "no msgpack"),
        (b"\x91" * 100_000, "message: "),
        (array()[:-1], "no msgpack"),
        (msgpack.packb({b"__ndarray__": True}), "dtype: got 'None'"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data, said):
    with pytest.raises(MessageError, match=said):
        unpack(data)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (b"dtype", "|O", "dtype: got '|O'"),
        (b"dtype", "<c8", "dtype"),
        (b"dtype", "<U0", "dtype"),
        (b"dtype", "f4,f4", "dtype"),
        (b"dtype", 7, "dtype: got '7'"),
        (b"dtype", "nonsense", "dtype: got 'nonsense'"),
        (b"shape", [2], "data: got 4 bytes, expected 8 for float32"),
        (b"shape", [-1], "shape"),
        (b"shape", [1.0], "shape"),
        (b"shape", [True], "shape"),
        (b"shape", [2**40, 2**40], "data: got 4 bytes, expected"),
        (b"shape", [1] * 9, "expected up to 8 sizes"),
        (b"shape", "1", "shape"),
        (b"data", "abcd", "data: got a str"),
        (b"data", None, "data: got a NoneType"),
    ],
)
def test_an_array_whose_parts_do_not_agree_is_refused(field, value, said):
    message = {b"__ndarray__": True, b"data": b"abcd", b"dtype": "<f4", b"shape": [1]} | {field: value}
    with pytest.raises(MessageError, match=said.replace("|", r"\|")):
        unpack(msgpack.packb(message))


@pytest.mark.parametrize("value", [np.array([None]), np.array([1j]), object()])
def test_what_messages_cannot_have_is_refused(value):
    with pytest.raises(MessageError, match="message: got"):
        pack({"a": value})
