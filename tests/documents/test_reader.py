"""Records of JSON: what each annotation takes and refuses, in words, and files that are no JSON."""

from typing import Annotated, Any, Literal, NamedTuple

import pytest
from annotated_types import Len

from stare_jax.config import ConfigError, Fraction, Positive
from stare_jax.documents import DocumentError, check_record, read_json, read_record
from stare_jax.documents.reader import Size, one_value

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a JSON file; there is none"),
        ("{", r"got a file that is not JSON \(.*\), expected one that is"),
        ("[1]", "got a list, expected an object of named fields"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', r"got a file that is not JSON \('c' twice\), expected one that is"),
        ("[" * 100_000, r"got a file that is not JSON \(.*recursion.*\), expected one that is"),
        (POINTER, "got a pointer of Git LFS, expected the file that it stands for: git lfs pull"),
        (b"\xff\xfe{}", r"got a file that cannot be read \(.*\), expected a JSON file"),
    ],
)
def test_fields_of_a_json_file_or_its_fault_in_one_line(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"config.json: {message}$") as error:
        read_json(file)
    assert "\n" not in str(error.value)
    file.write_text('{"a": [1]}')
    assert read_json(file) == read_json(file, optional=True) == {"a": [1]}
    # A file may be asked for beside a file, in place of a folder.
    assert read_json(tmp_path / "no.json", optional=True) == read_json(file / "no.json", optional=True) == {}
    with pytest.raises(DocumentError, match="cannot be read"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', "utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


class Inner(NamedTuple):
    rank: Size
    scale: Positive = 1.0


class Outer(NamedTuple):
    name: str
    inner: Inner
    pairs: tuple[tuple[int, bool], ...] = ()
    kind: Literal["a", 3, False] = "a"
    flag: Literal[True] | None = None
    size: Size | None = None
    sizes: list[int] = []
    three: Annotated[tuple[Fraction, ...], Len(3, 3)] = (0, 0, 0)
    by_name: dict[str, Inner] = {}
    nothing: None = None
    anything: Any = None


GOOD = {"name": "x", "inner": {"rank": 2}}


def test_a_document_becomes_a_record():
    changes = {"pairs": [[1, True]], "kind": 3, "flag": True, "size": None, "sizes": [2], "three": [0, 0.5, 1]}
    got = check_record(Outer, GOOD | changes | {"by_name": {"y": {"rank": 1, "scale": 2}}, "unknown": 1}, "f.json")
    assert got == Outer("x", Inner(2), ((1, True),), 3, True, None, [2], (0.0, 0.5, 1.0), {"y": Inner(1, 2.0)})
    assert [type(x) for x in got.three] == [float] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name: got null, expected text"),
        ({"name": 1}, "name: got 1, expected text"),
        ({"inner": []}, r"inner: got \[\], expected an object"),
        ({"inner": {}}, r"inner.rank: got nothing, expected a whole number"),
        ({"inner": {"rank": 0}}, "inner.rank: got 0, expected greater than or equal to 1"),
        ({"inner": {"rank": 2**63}}, "inner.rank: got 9223372036854775808, expected less than or equal to 10000000"),
        ({"inner": {"rank": True}}, "inner.rank: got True, expected a whole number"),
        ({"inner": {"rank": 2.0}}, "inner.rank: got 2.0, expected a whole number"),
        ({"inner": {"rank": 1, "scale": 0}}, "inner.scale: got 0, expected greater than 0"),
        ({"inner": {"rank": 1, "scale": float("nan")}}, "inner.scale: got nan, expected a finite number"),
        ({"inner": {"rank": 1, "scale": float("inf")}}, "inner.scale: got inf, expected a finite number"),
        ({"inner": {"rank": 1, "scale": 1e39}}, "inner.scale: got 1e[+]39, expected less than or equal to 3402823"),
        ({"inner": {"rank": 1, "scale": 10**400}}, "inner.scale: got 1000.*, expected a finite number"),
        ({"inner": {"rank": 1, "scale": "1"}}, "inner.scale: got '1', expected a finite number"),
        ({"pairs": {}}, r"pairs: got {}, expected a list"),
        ({"pairs": "ab"}, "pairs: got 'ab', expected a list"),
        ({"pairs": [[1]]}, r"pairs\[0\]\[1\]: got \[1\], expected one more item"),
        ({"pairs": [[1, True, 3]]}, r"pairs\[0\]: got \[1, True, 3\], expected at most 2 items"),
        ({"pairs": [[2**63, True]]}, r"pairs\[0\]\[0\]: got 9223372036854775808, expected less than or equal to 92"),
        ({"pairs": [["a", True], ["b", 2]]}, r"pairs\[0\]\[0\]: got 'a', expected a whole number$"),
        ({"pairs": [[1, 1]]}, r"pairs\[0\]\[1\]: got 1, expected true or false"),
        ({"kind": "b"}, "kind: got 'b', expected 'a' or 3 or False"),
        ({"kind": 0}, "kind: got 0, expected 'a' or 3 or False"),
        ({"kind": 3.0}, "kind: got 3.0, expected 'a' or 3 or False"),
        ({"kind": None}, "kind: got null, expected 'a' or 3 or False"),
        ({"flag": 1}, "flag: got 1, expected True"),
        ({"inner": [2]}, r"inner: got \[2\], expected an object"),
        ({"size": 0}, "size: got 0, expected greater than or equal to 1"),
        ({"sizes": [1.0]}, r"sizes\[0\]: got 1.0, expected a whole number"),
        ({"three": [0, 0]}, r"three: got \[0, 0\], expected at least 3 items"),
        ({"three": [0, 0, 2]}, r"three\[2\]: got 2, expected less than or equal to 1$"),
        ({"by_name": {"y": {"rank": -1}}}, "by_name.y.rank: got -1"),
        ({"by_name": [1]}, r"by_name: got \[1\], expected an object"),
        ({"nothing": 0}, "nothing: got 0, expected null"),
    ],
)
def test_a_field_that_does_not_fit_is_named_with_got_and_expected(changes, message):
    with pytest.raises(DocumentError, match=f"^f.json: {message}") as error:
        check_record(Outer, GOOD | changes, "f.json")
    assert "\n" not in str(error.value)


def test_all_fields_that_do_not_fit_are_listed():
    with pytest.raises(DocumentError) as error:
        check_record(Outer, {"inner": {"rank": 0}, "kind": []}, "f.json")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["f.json", "  name", "  inner.rank", "  kind"]


def test_unknown_fields_are_passed_over(tmp_path):
    (tmp_path / "f.json").write_text('{"rank": 1, "rang": 2}')
    assert read_record(Inner, tmp_path / "f.json") == Inner(1)


def test_two_names_of_one_field_have_one_value():
    assert one_value("f", {"a": None, "b": None}) is None
    assert one_value("f", {"a": 1, "b": None}) == one_value("f", {"a": 1, "b": 1}) == 1
    with pytest.raises(DocumentError, match="f: got a: 1, b: 2, expected the same value under both names"):
        one_value("f", {"a": 1, "b": 2})
