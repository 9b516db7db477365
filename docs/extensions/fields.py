"""The reference of configurations, read from the dataclasses: what fields take, defaults, and the texts below them.

It stands in a page in the place of one line, `FIELDS`.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Interval, MinLen
from sphinx.application import Sphinx

FIELDS = "<!-- fields of a run's configuration -->"
_WORDS = {bool: "True or False", int: "whole number", float: "number", str: "text"}


class Section(typing.NamedTuple):
    """One dataclass of a configuration, and the places where it stands."""

    cls: type
    paths: tuple[str, ...]


def sections(cls: type, path: str) -> Iterator[Section]:
    """Yields a dataclass and all that are inside it, each at each of its places."""
    yield Section(cls, (path,))
    for name, hint in typing.get_type_hints(cls).items():
        for inner in _classes_in(hint):
            yield from sections(inner, f"{path}.{name}")


def merged(found: Iterator[Section]) -> list[Section]:
    """Returns every class once, with all its places."""
    paths: dict[type, list[str]] = {}
    for cls, (path,) in found:
        places = paths.setdefault(cls, [])
        places += [path] if path not in places else []
    return [Section(cls, tuple(places)) for cls, places in paths.items()]


def field_texts(cls: type) -> dict[str, str]:
    """Returns field -> the text below it in the source of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts = {}
    for node, below in zip(definition.body, [*definition.body[1:], None], strict=True):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and is_text and isinstance(below.value.value, str):
            texts[node.target.id] = " ".join(below.value.value.split())
    return texts


def in_words(hint: Any) -> str:
    """Returns what a field takes, by its annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{word!r}`" for word in args)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join("None" if item is type(None) else in_words(item) for item in args)
    if origin is tuple:
        items = args[:1] if args[-1] is Ellipsis else args
        return f"{'list' if args[-1] is Ellipsis else 'tuple'} of ({'; '.join(map(in_words, items))})"
    if origin is Annotated:
        return f"{in_words(args[0])}{_range(args[1])}"
    if dataclasses.is_dataclass(hint):
        return f"[`{hint.__name__}`](#{hint.__name__.lower()})"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _range(mark: Any) -> str:
    if isinstance(mark, MinLen):
        return f", at least {mark.min_length}"
    if not isinstance(mark, Interval):
        return ", a regular expression"
    low = f"> {mark.gt}" if mark.gt is not None else f"≥ {mark.ge}" if mark.ge is not None else ""
    high = f"< {mark.lt}" if mark.lt is not None else f"≤ {mark.le}" if mark.le is not None else ""
    return f" {' and '.join(filter(None, (low, high)))}".rstrip()


def default_of(field: dataclasses.Field) -> str:
    """Returns the default as it is written; of a dataclass what differs from its own defaults."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "no default"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        plain = {item.name: item.default for item in dataclasses.fields(value)}
        changed = {name: getattr(value, name) for name in plain if getattr(value, name) != plain[name]}
        return f"default: {', '.join(f'`{name}={given!r}`' for name, given in changed.items()) or 'its own defaults'}"
    return f"default: `{value!r}`"


def _classes_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):  # and not a range, which annotates a number
        return [hint]
    return [found for item in typing.get_args(hint) for found in _classes_in(item)]


def _markdown(section: Section) -> str:
    cls, paths = section
    hints, texts = typing.get_type_hints(cls, include_extras=True), field_texts(cls)
    places = ", ".join(f"`{path}`" for path in paths)
    lines = [f"## {cls.__name__}", "", f"{places}. {_escape(' '.join(inspect.getdoc(cls).split()))}", ""]
    for field in dataclasses.fields(cls):
        lines += [f"`{field.name}`: {in_words(hints[field.name])}; {default_of(field)}"]
        inner = _classes_in(hints[field.name])
        text = texts[field.name] if field.name in texts or not inner else inspect.getdoc(inner[0]).split("\n\n")[0]
        lines += [f": {_escape(' '.join(text.split()))}", ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<\[\]$_])", r"\\\1", piece) for piece in pieces)


def reference() -> str:
    """Returns the fields of a run's configuration as Markdown."""
    from stare_jax.runs.config import RunConfig

    return "\n".join(map(_markdown, merged(sections(RunConfig, "config"))))


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    if FIELDS in source[0]:
        source[0] = source[0].replace(FIELDS, reference())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
