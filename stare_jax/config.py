"""Frozen dataclasses <-> nested plain dicts, so that defaults live beside the code they configure.

`configs/*.py` turn the dict into an `ml_collections.ConfigDict` and change what differs; `from_dict` turns it back and
names the path of whatever does not fit.
"""

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval, MinLen

_NAME_BYTES = 200
"""Longest name of a user's; file systems allow 255, and endings are added."""


class UserError(Exception):
    """A mistake that a command's user can put right: a command prints its message as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be built; the message names the field, what it got and what was expected."""


def choices(hint: Any) -> tuple[Any, ...]:
    """Returns the values that an annotation `Literal[...]` or `Literal[...] | None` allows, () for any other."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inside = [choices(item) for item in typing.get_args(hint) if item is not type(None)]
        return sum(inside, ()) if all(inside) else ()
    return ()


def list_choices(cls: type, *, path: str = "config") -> dict[str, tuple[Any, ...]]:
    """Returns path -> choices of every `Literal` field of a dataclass and of those inside it, for a command's help.

    A field that is a tuple of such words has their choices.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        items = typing.get_args(hint)[:1] if typing.get_origin(hint) is tuple else ()
        if allowed := choices(hint) or sum(map(choices, items), ()):
            found[f"{path}.{name}"] = allowed
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):  # of a union, a field may have the choices of either
                for field, allowed in list_choices(inner, path=f"{path}.{name}").items():
                    found[field] = tuple(dict.fromkeys((*found.get(field, ()), *allowed)))
    return found


class Mark(enum.Enum):
    """Conditions that annotated_types has no word for, in a field's annotation: `Annotated[str, Mark.REGEX]`."""

    REGEX = "a text that is a regular expression"


Finite = Annotated[float, Interval()]
"""float of a configuration; with an interval or without, NaN and infinity are none"""
Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Interval(ge=1)]
Natural = Annotated[int, Interval(ge=0)]
Seed = Annotated[int, Interval(ge=0, le=99)]
"""seed of a run; every one has seeds of the simulator's of its own (`envs.seeds`)"""
Pattern = Annotated[str, Mark.REGEX]
LARGEST_INT = 2**31 - 1
"""Largest whole number of a field: numbers of arrays and of their items are 32 bits wide."""


def check_fields(config: Any) -> None:
    """Checks every field of a frozen dataclass by its annotation; called from its `__post_init__`.

    A field becomes what `from_dict` would have made of it: lists are tuples, whole numbers are floats where a float is
    expected, and NumPy's numbers are Python's.

    Raises:
        ConfigError: a field is not of its type, has none of its choices, is not finite, or is outside its interval; the
            message names it, got and expected.
    """
    for name, hint in _annotations(type(config)).items():
        object.__setattr__(config, name, convert(hint, getattr(config, name), name))


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@contextlib.contextmanager
def user_input(place: str = "") -> Iterator[None]:
    """Turns the ValueErrors of values that a command line or a file gives into errors that the user can put right.

    Raises:
        ConfigError: for every ValueError, with its message, which begins with the place if there is one.
    """
    try:
        yield
    except ValueError as error:
        # One of a field does not say where the field is from; others, such as those of documents, name their file.
        if isinstance(error, UserError) and not (place and type(error) is ConfigError):
            raise
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error


def home_path(text: str) -> Path:
    """Returns the path that a user has written: `~` at its beginning is the home directory, `~name` that of a user.

    Shells leave a `~` after `=` as it is, so every path of a command line or a configuration comes through here.

    Raises:
        ConfigError: it is empty, has a line's end in it, there is no such directory, or its links lead in a circle.
    """
    if not text:
        raise ConfigError("got an empty path, expected the name of a file or a folder")
    if any(character < " " for character in text):
        raise ConfigError(f"got {text!r}, expected a path without control characters or line ends")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"got {text!r}, expected a path; no such home directory is known") from error
    try:
        path.resolve()
    except RuntimeError as error:
        raise ConfigError(f"got {text!r}, expected a path; its links lead in a circle") from error
    return path


def check_name(name: str, field: str) -> str:
    """Returns a name that a user has chosen and that becomes part of a path.

    Raises:
        ConfigError: it would not be one file or folder where it is expected.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > _NAME_BYTES:
        raise ConfigError(
            f"{field}: got {name!r}, expected letters, digits, '_', '-' and '.', which does not come first; at most "
            f"{_NAME_BYTES}"
        )
    return name


def make_name(text: str) -> str:
    """Returns a name as `check_name` wants it, made of any text."""
    return re.sub(r"[^\w-]+", "_", text)[:_NAME_BYTES] or "_"


def to_dict(config: Any) -> Any:
    """Returns a dataclass as nested dicts, tuples and scalars."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return tuple(to_dict(item) for item in config)
    return config


def from_dict(cls: type, values: Mapping[str, Any], *, path: str = "config") -> Any:
    """Builds the dataclass `cls` from nested mappings.

    Args:
      cls: a frozen dataclass whose annotations are scalars, tuples, dataclasses or unions of them. Where it has a
        function `fill_in(values) -> values`, that one completes fields that follow from others.
      values: a mapping with the dataclass's fields; fields left out keep their defaults. A text that begins as a path
        of the home directory, `~/`, is one.
      path: where this mapping stands, for the message of an error.
    Raises:
      ConfigError: for an unknown field, a value of the wrong type, or one that the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: got {values!r}, expected the fields of {cls.__name__}")
    hints = _annotations(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{path}: unknown field(s) {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    if hasattr(cls, "fill_in"):
        values = cls.fill_in(values)
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [field.name for field in dataclasses.fields(cls) if (field.default, field.default_factory) == absent]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{path}: got no {', '.join(missing)}, expected all fields that have no default")
    arguments = {name: convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def convert(hint: Any, value: Any, path: str) -> Any:
    """Returns a value as an annotation of a field has it; raises ConfigError, which begins with `path`."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _convert_marked(*typing.get_args(hint), value, path)
    if allowed := choices(hint):
        is_missing = value is None and type(None) in typing.get_args(hint)
        if not is_missing and not any(type(value) is type(word) and value == word for word in allowed):
            raise ConfigError(f"{path}: got {value!r}, expected one of {allowed}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return from_dict(hint, value, path=path)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, path)
    if hint in (int, float):
        return _convert_number(hint, Interval(), value, path)
    if hint is str and isinstance(value, str) and re.match(r"~[\w.-]*(/|$)", value):
        return _home_field(value, path)
    if isinstance(hint, type) and hint is not Any and not isinstance(value, hint):
        raise ConfigError(f"{path}: got {value!r}, expected {hint.__name__}")
    return value


def _home_field(value: str, path: str) -> str:
    try:
        return str(home_path(value))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert_marked(hint: Any, mark: Any, value: Any, path: str) -> Any:
    """Converts a value of an annotation with a mark: `Interval` of a number, `MinLen` of a tuple, or a `Mark`."""
    if isinstance(mark, Interval):
        return _convert_number(hint, mark, value, path)
    value = convert(hint, value, path)
    if isinstance(mark, MinLen) and len(value) < mark.min_length:
        raise ConfigError(f"{path}: got {value!r}, expected at least {mark.min_length} items")
    if mark is Mark.REGEX:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{path}: got {value!r}, expected a regular expression: {error}") from error
    return value


def _convert_number(hint: type, interval: Interval, value: Any, path: str) -> int | float:
    """Converts a number, NumPy's too; True and False are none."""
    kind = numbers.Integral if hint is int else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{path}: got {value!r}, expected {hint.__name__}")
    if hint is int and abs(value) > LARGEST_INT:
        raise ConfigError(f"{path}: got {value}, expected at most {LARGEST_INT}")
    value, is_finite = hint(value), math.isfinite(value)
    is_above = (interval.gt is None or value > interval.gt) and (interval.ge is None or value >= interval.ge)
    is_below = (interval.lt is None or value < interval.lt) and (interval.le is None or value <= interval.le)
    if not (is_finite and is_above and is_below):
        kind = "" if is_finite else "a finite number "
        raise ConfigError(f"{path}: got {value}, expected {kind}{_interval_in_words(interval)}".rstrip())
    return value


def _interval_in_words(interval: Interval) -> str:
    """Returns `>= 0`, or `in (0, 1]`; an empty text where any finite number will do."""
    low, high = (ge if gt is None else gt for gt, ge in ((interval.gt, interval.ge), (interval.lt, interval.le)))
    if low is not None and high is not None:
        return f"in {'[' if interval.gt is None else '('}{low}, {high}{']' if interval.lt is None else ')'}"
    if high is not None:
        return f"{'<=' if interval.lt is None else '<'} {high}"
    return "" if low is None else f"{'>=' if interval.gt is None else '>'} {low}"


def _convert_tuple(hints: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: got {value!r}, expected a sequence")
    if len(hints) == 2 and hints[1] is Ellipsis and choices(hints[0]):
        # Words of a few, "sft,ppo", need neither quotes nor brackets on a command line.
        value = [word for item in value for word in (item.split(",") if isinstance(item, str) else [item])]
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if hints and len(hints) != len(value):
        raise ConfigError(f"{path}: got {len(value)} items {value!r}, expected {len(hints)}")
    return tuple(convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _convert_union(hints: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    candidates = [hint for hint in hints if hint is not type(None)]
    if isinstance(value, Mapping) and all(map(dataclasses.is_dataclass, candidates)):
        # What most of the fields belong to is meant, so that a wrong one is named among the right ones.
        num_known = {hint: len({f.name for f in dataclasses.fields(hint)} & set(value)) for hint in candidates}
        best = max(num_known, key=num_known.get)
        if num_known[best]:
            return convert(best, value, path)
    errors = []
    for hint in candidates:
        try:
            return convert(hint, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        is_whole = type(None) in hints and not dataclasses.is_dataclass(candidates[0])
        raise ConfigError(f"{errors[0]} or None") if is_whole else errors[0]
    names = " or ".join(getattr(hint, "__name__", str(hint)) for hint in candidates)
    raise ConfigError(f"{path}: got {value!r}, expected {names}; " + "; ".join(str(error) for error in errors))
