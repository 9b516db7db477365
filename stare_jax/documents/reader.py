"""Reader of JSON: a file's content is compared with a record, which says what each field may be.

A record is a NamedTuple with annotations. A field with a default need not be there; null is a value like any other, and
fits `X | None` alone. Annotations are

    int, float, bool, str      of JSON's type exactly; an int fits into 64 bits; a float is finite in float32
                               and may be written as an integer
    Literal[...], None         one of these values, of the same type
    tuple[X, ...], tuple[X, Y] a list; `list[X]` likewise, which stays a list
    dict[str, X]               an object whose names are not known
    another record, X | Y, Any
    Annotated[X, Interval(..)] numbers within bounds; with `Length(...)`, a list of as many items
"""

import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from stare_jax.config import ConfigError, Interval, interval_in_words

MAX_FLOAT = 3.4028234663852886e38
"""largest float32"""
MAX_INT = 2**63 - 1
NOTHING = object()
"""stands for a field that is not there"""
_POINTER = b"version https://git-lfs."
_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


class DocumentError(ConfigError):
    """JSON that is not what it has to be; the message names file, field, got and expected."""


class Length(NamedTuple):
    """Bounds of the number of items in a list."""

    low: int = 0
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"at least {self.low}"


Size = Annotated[int, Interval(1, 10**7)]
"""a size of an array; larger ones could only be damaged"""
Numbers = tuple[float, ...]


def refuse_pointer(file: Path) -> None:
    """Raises DocumentError for a file that Git LFS has left in place of a large one, which it did not fetch."""
    try:
        with Path(file).open("rb") as stream:
            is_pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError:  # said where the file is read
        return
    if is_pointer:
        raise DocumentError(f"{file}: got a pointer of Git LFS, expected the file that it stands for: git lfs pull")


def refuse_dangling(folder: Path) -> None:
    """Raises DocumentError for links to files that are not there, which would pass for files that a folder has not."""
    links = [path for path in Path(folder).glob("[!.]*") if path.is_symlink()]  # hidden ones are locks of editors
    if lost := sorted(path.name for path in links if not path.exists()):
        raise DocumentError(f"{folder}: got links to files that are not there, {', '.join(lost)}, expected the files")


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Reads the fields of a JSON file, whose values are not checked; {} where it is optional and not there.

    Raises:
        DocumentError: it is not there, cannot be read, is not JSON or no object, or names a field twice.
    """
    refuse_pointer(file)
    try:
        text = Path(file).read_text("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        if optional:
            return {}
        raise DocumentError(f"{file}: expected a JSON file; there is none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{file}: got a file that cannot be read ({error}), expected a JSON file") from error
    return parse_json(text, str(file))


def parse_json(text: str, place: str, *, what: str = "file") -> dict[str, Any]:
    """Returns the fields of a JSON object, which is a file, or what it is called.

    Raises:
        DocumentError: it is not JSON or no object, or names a field twice; begins with `place`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{place}: got a {what} that is not JSON ({error}), expected one that is") from error
    if not isinstance(content, dict):
        raise DocumentError(f"{place}: got a {type(content).__name__}, expected an object of named fields")
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # of the two, another reader might take the other one
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in fields if names.count(name) > 1)!r} twice")
    return fields


def read_record(cls: Any, file: Path, *, only: bool = False) -> Any:
    """Reads a JSON file as a record, see `check_record`; raises DocumentError, also where it is not there."""
    return check_record(cls, read_json(file), str(file), only=only)


def check_record(cls: Any, value: Any, place: str, *, path: str = "", only: bool = False) -> Any:
    """Returns a value of JSON as an annotation has it, lists as tuples and objects as records.

    Args:
        cls: a record, or any other annotation of this module.
        value: as `json.loads` returns it.
        place: the file, with which every message begins.
        path: names of the fields on the way from the file to the value.
        only: whether fields that a record does not have are refused instead of passed over.

    Raises:
        DocumentError: names place, field, got and expected, of all fields that do not fit.
    """
    reading = _Reading(only, [])
    result = reading.convert(cls, value, path)
    raise_problems(place, reading.problems)
    return result


def raise_problems(place: str, problems: Sequence[str]) -> None:
    """Raises DocumentError if there are any problems: one is in the same line as the place, several are below it."""
    if problems:
        separator = " " if len(problems) == 1 else "\n  "
        raise DocumentError(f"{place}:{separator}" + "\n  ".join(problems))


def one_value(place: str, values: Mapping[str, Any]) -> Any:
    """Returns the value of a field that has several names, None where there is none.

    Raises:
        DocumentError: two names have different values, of which another program might take the other.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        got = ", ".join(f"{name}: {value!r}" for name, value in given.items())
        raise DocumentError(f"{place}: got {got}, expected the same value under both names")
    return next(iter(given.values()), None)


def show(value: Any) -> str:
    """Returns a value in short, for a message."""
    if value is NOTHING:
        return "nothing"
    return "null" if value is None else _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 10
_SHORT.maxstring = _SHORT.maxother = 60


class _Reading(NamedTuple):
    """One pass over a document."""

    only: bool
    problems: list[str]

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        hint, limits = (typing.get_args(hint)[0], hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        origin, before = typing.get_origin(hint), len(self.problems)
        if origin in (typing.Union, types.UnionType):
            return self._union(hint, value, path)
        if _is_record(hint):
            result = self._record(hint, value, path)
        elif origin in (tuple, list):
            result = self._list(hint, limits, value, path)
        elif origin is dict and isinstance(value, dict):
            item = typing.get_args(hint)[1]
            result = {name: self.convert(item, inner, _join(path, name)) for name, inner in value.items()}
        elif _fits(hint, origin, value):
            result = float(value) if hint is float else value
        else:
            return self._refuse(hint, limits, value, path)
        bounds = [limit for limit in limits if isinstance(limit, Interval)]
        if len(self.problems) == before and not all(_within(result, bound) for bound in bounds):
            self._refuse(hint, limits, value, path)
        return result

    def _refuse(self, hint: Any, limits: Sequence[Any], value: Any, path: str) -> None:
        self.problems.append(f"{path}: got {show(value)}, expected {_describe(hint, limits)}".removeprefix(": "))

    def _union(self, hint: Any, value: Any, path: str) -> Any:
        kinds = typing.get_args(hint)
        if value is None and type(None) in kinds:
            return None
        kinds = [kind for kind in kinds if kind is not type(None)]
        for kind in kinds:
            attempt = _Reading(self.only, [])
            result = attempt.convert(kind, value, path)
            if not attempt.problems:
                return result
        if len(kinds) == 1 and value is not NOTHING and not _is_scalar(kinds[0]):
            self.problems.extend(attempt.problems)
        else:
            self._refuse(hint, (), value, path)
        return None

    def _record(self, cls: Any, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return self._refuse(cls, (), value, path)
        hints, defaults = _hints(cls), cls._field_defaults
        fields = dict(defaults)
        for name, hint in hints.items():
            if name in value or name not in defaults:
                fields[name] = self.convert(hint, value.get(name, NOTHING), _join(path, name))
        if self.only and (unknown := [name for name in value if name not in hints]):
            known = f"expected some of {', '.join(hints)}"
            self.problems.extend(f"{_join(path, name)}: got an unknown field, {known}" for name in unknown)
        return cls(**fields)

    def _list(self, hint: Any, limits: Sequence[Any], value: Any, path: str) -> Any:
        if not isinstance(value, (list, tuple)):
            return self._refuse(hint, limits, value, path)
        kinds, is_list = typing.get_args(hint), typing.get_origin(hint) is list
        is_any_length = is_list or kinds[1:] == (Ellipsis,)
        lengths = [limit for limit in limits if isinstance(limit, Length)]
        lengths += [] if is_any_length else [Length(len(kinds), len(kinds))]
        for length in lengths:
            if not length.low <= len(value) <= length.high:
                self.problems.append(f"{path}: got {len(value)} items, expected {length}")
                return None
        kinds = (kinds[0],) * len(value) if is_any_length else kinds
        items, before = [], len(self.problems)
        for i, item in enumerate(value):
            items.append(self.convert(kinds[i], item, f"{path}[{i}]"))
            if len(self.problems) > before:  # of a list that is wrong throughout, one item is enough
                break
        return items if is_list else tuple(items)


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _is_scalar(hint: Any) -> bool:
    return hint in _NAMES or typing.get_origin(hint) is Literal


def _fits(hint: Any, origin: Any, value: Any) -> bool:
    """Returns whether a value is one of a scalar annotation."""
    if value is NOTHING:
        return False
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= MAX_FLOAT  # False for NaN
    if hint is int:
        return type(value) is int and abs(value) <= MAX_INT
    return type(value) is (type(None) if hint is None else hint)


def _within(value: Any, bound: Interval) -> bool:
    """Returns whether a number, or every number of a list, is in an interval."""
    values = value if isinstance(value, tuple) else (value,)
    is_above = all(bound.low <= x if bound.has_low else bound.low < x for x in values)
    return is_above and all(x <= bound.high if bound.has_high else x < bound.high for x in values)


def _describe(hint: Any, limits: Sequence[Any] = ()) -> str:
    """Returns an annotation in words."""
    if hasattr(hint, "__metadata__"):
        hint, limits = typing.get_args(hint)[0], hint.__metadata__
    kinds, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, kinds))
    if origin is Literal:
        return " or ".join("null" if value is None else repr(value) for value in kinds)
    if origin in (tuple, list):
        lengths = [limit for limit in limits if isinstance(limit, Length)]
        lengths += [] if origin is list or kinds[1:] == (Ellipsis,) else [Length(len(kinds), len(kinds))]
        words = f"a list of {' and '.join(map(str, lengths))} items" if lengths else "a list"
        words = f"{words}, each {_describe(kinds[0])}"
    elif _is_record(hint):
        words = f"an object with {', '.join(hint._fields[:4])}{' ...' if len(hint._fields) > 4 else ''}"
    elif origin is dict:
        words = "an object"
    else:
        words = _NAMES.get(type(None) if hint is None else hint, "a value")
    return " ".join([words, *(interval_in_words(limit) for limit in limits if isinstance(limit, Interval))])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
