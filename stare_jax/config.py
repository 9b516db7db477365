"""Frozen dataclasses <-> nested plain dicts, so that defaults live beside the code they configure.

`configs/*.py` turn the dict into an `ml_collections.ConfigDict` and change what differs; `from_dict` turns it back and
names the path of whatever does not fit.
"""

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def check_choices(config: Any) -> None:
    """Checks every `Literal` field of a dataclass; called from its `__post_init__`.

    Raises:
        ValueError: a field has none of its choices; the message names it, got and expected.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed, value = choices(hint), getattr(config, name)
        is_missing = value is None and type(None) in typing.get_args(hint)
        if allowed and not is_missing and value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Checks that fields of a dataclass are numbers of at least `minimum`; None passes where the field allows it.

    Raises:
        ValueError: one is less, or not a number.
    """
    hints = typing.get_type_hints(type(config))
    for name in names:
        value, is_optional = getattr(config, name), type(None) in typing.get_args(hints[name])
        if not (value is None and is_optional) and not value >= minimum:
            raise ValueError(f"{name}: got {value}, expected >= {minimum}{' or None' if is_optional else ''}")


def check_above(config: Any, bound: float, *names: str) -> None:
    """Checks that fields of a dataclass are numbers greater than `bound`; None passes where the field allows it.

    Raises:
        ValueError: one is not.
    """
    hints = typing.get_type_hints(type(config))
    for name in names:
        value, is_optional = getattr(config, name), type(None) in typing.get_args(hints[name])
        if not (value is None and is_optional) and not value > bound:
            raise ValueError(f"{name}: got {value}, expected > {bound}{' or None' if is_optional else ''}")


@contextlib.contextmanager
def user_input(place: str = "") -> Iterator[None]:
    """Turns the ValueErrors of values that a command line or a file gives into errors that the user can put right.

    Raises:
        ConfigError: for every ValueError, with its message, which begins with the place if there is one.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error


def home_path(text: str) -> Path:
    """Returns the path that a user has written: `~` at its beginning is the home directory, `~name` that of a user.

    Shells leave a `~` after `=` as it is, so every path of a command line or a configuration comes through here.

    Raises:
        ConfigError: it is empty, or there is no such directory.
    """
    if not text:
        raise ConfigError("got an empty path, expected the name of a file or a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"got {text!r}, expected a path; no such home directory is known") from error


def check_name(name: str, field: str) -> str:
    """Returns a name that a user has chosen and that becomes part of a path.

    Raises:
        ConfigError: it would not be one file or folder where it is expected.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > _NAME_BYTES:
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
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{path}: unknown field(s) {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    if hasattr(cls, "fill_in"):
        values = cls.fill_in(values)
    arguments = {name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if allowed := choices(hint):
        if value not in allowed and not (value is None and type(None) in typing.get_args(hint)):
            raise ConfigError(f"{path}: got {value!r}, expected one of {allowed}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: got {value!r}, expected the fields of {hint.__name__}")
        return from_dict(hint, value, path=path)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str) and re.match(r"~[\w.-]*(/|$)", value):
        return _home_field(value, path)
    if isinstance(hint, type) and hint is not Any:
        exact = type(value) is hint if hint in (int, bool, float) else isinstance(value, hint)
        if not exact:
            raise ConfigError(f"{path}: got {value!r}, expected {hint.__name__}")
    return value


def _home_field(value: str, path: str) -> str:
    try:
        return str(home_path(value))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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
    return tuple(_convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _convert_union(hints: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    candidates = [hint for hint in hints if hint is not type(None)]
    if isinstance(value, Mapping) and all(map(dataclasses.is_dataclass, candidates)):
        # What most of the fields belong to is meant, so that a wrong one is named among the right ones.
        num_known = {hint: len({f.name for f in dataclasses.fields(hint)} & set(value)) for hint in candidates}
        best = max(num_known, key=num_known.get)
        if num_known[best]:
            return _convert(best, value, path)
    errors = []
    for hint in candidates:
        try:
            return _convert(hint, value, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    names = " or ".join(getattr(hint, "__name__", str(hint)) for hint in candidates)
    raise ConfigError(f"{path}: got {value!r}, expected {names}; " + "; ".join(str(error) for error in errors))
