"""Every number, sequence and regular expression of every configuration, with values that it must not take.

The fields are found by a walk over the annotations of `RunConfig`, so that a new one is among them.
"""

import dataclasses
import math
import typing
from typing import Annotated, Any

import pytest
from annotated_types import Interval, MinLen

from stare_jax.config import ConfigError, Mark, choices
from stare_jax.data.import_rlds import ImportConfig
from stare_jax.envs import EnvConfig
from stare_jax.models import PI05_LORA, LoRAConfig, MLPConfig, openvla_tiny, pi05_tiny
from stare_jax.runs.config import RunConfig
from stare_jax.stages import get_task

ENV = EnvConfig("PushCube-v1")
ROOTS = (
    RunConfig(ENV, openvla_tiny(lora=LoRAConfig()), get_task("PushCube-v1").params),
    RunConfig(ENV, pi05_tiny(lora=PI05_LORA), get_task("PushCube-v1").params),
    MLPConfig(),
    ImportConfig(),
)


def parts_of(config: Any) -> dict[type, Any]:
    """Returns the dataclasses of a configuration by type."""
    found = {type(config): config}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                found |= parts_of(item)
    return found


def classes_in(hint: Any) -> set[type]:
    """Returns the dataclasses that an annotation, or the annotations of its dataclasses, speak of."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint).values()
        return {hint}.union(*map(classes_in, hints))
    return set().union(*map(classes_in, typing.get_args(hint)))


PARTS = {cls: part for root in ROOTS for cls, part in parts_of(root).items()}
FIELDS = [
    pytest.param(part, name, hint, id=f"{cls.__name__}.{name}")
    for cls, part in PARTS.items()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items()
]


def leaves_of(hint: Any, path: str = "") -> list[tuple[str, Any]]:
    """Returns the numbers and texts of an annotation, each with its place behind the field's name, as `[0][1]`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if choices(hint) or hint is type(None) or hint is bool or dataclasses.is_dataclass(hint):
        return []
    if origin is Annotated and typing.get_origin(args[0]) is None:
        return [(path, hint)]
    if origin is Annotated:
        return leaves_of(args[0], path)
    if origin is tuple:
        items = args[:1] if args[-1] is Ellipsis else args
        return [leaf for i, item in enumerate(items) for leaf in leaves_of(item, f"{path}[{i}]")]
    if args:
        return [leaf for item in args for leaf in leaves_of(item, path)]
    return [(path, hint)]


def bounds(interval: Interval) -> tuple[float | None, float | None]:
    """Returns the lower and the upper bound of an interval, None where there is none."""
    return interval.ge if interval.gt is None else interval.gt, interval.le if interval.lt is None else interval.lt


def filler(hint: Any) -> Any:
    """Returns a value that an annotation allows: 3, which few intervals leave out, or the middle of those that do."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and isinstance(args[1], Interval):
        low, high = bounds(args[1])
        return args[0](3 if high is None else (low + high) / 2)
    if origin is Annotated:
        return filler(args[0])
    if origin is tuple:
        return tuple(filler(item) for item in (args[:1] if args[-1] is Ellipsis else args))
    return hint() if isinstance(hint, type) else None


def with_leaf(hint: Any, path: str, value: Any) -> Any:
    """Returns a value of an annotation that is right but for the leaf at a path."""
    if not path:
        return value
    number, rest = path[1:].split("]", 1)
    (sequence,) = [item for item in (hint, *typing.get_args(hint)) if "tuple" in str(typing.get_origin(item))]
    items = typing.get_args(sequence)
    items = items[:1] if items[-1] is Ellipsis else items
    return tuple(with_leaf(item, rest, value) if i == int(number) else filler(item) for i, item in enumerate(items))


def wrong_values(hint: Any) -> list[Any]:
    """Returns values that a number or a text must not take, by its annotation."""
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if kind is str:
        return [3, None, *(["("] if marks == [Mark.REGEX] else [])]
    values = ["3", True, 2.5 if kind is int else "nan", (3,)]
    values += [2**31, -(2**31)] if kind is int else [math.nan, math.inf, -math.inf]
    for interval in marks:
        low, high = bounds(interval)
        if low is not None:
            values += [kind(low) - 1] if interval.gt is None else [kind(low)]
        if high is not None:
            values += [kind(high) + 1] if interval.lt is None else [kind(high)]
    return values


def test_the_walk_comes_to_every_part_of_a_run():
    assert set(PARTS) >= classes_in(RunConfig)
    assert len(FIELDS) > 180 and sum("float" in str(field.values[2]) for field in FIELDS) >= 63


@pytest.mark.parametrize(("part", "name", "hint"), FIELDS)
def test_a_field_takes_no_value_outside_its_declaration(part, name, hint):
    for path, leaf in leaves_of(hint):
        if leaf in (int, float):
            pytest.fail(f"{name}{path}: {leaf.__name__} without an interval; Finite, Count, Natural, ... have one")
        for wrong in wrong_values(leaf):
            with pytest.raises(ConfigError) as error:
                dataclasses.replace(part, **{name: with_leaf(hint, path, wrong)})
            assert str(error.value).startswith(f"{name}{path}: got "), (wrong, str(error.value))
            assert "expected" in str(error.value) and "\n" not in str(error.value)
    for sequence in (hint, *typing.get_args(hint)):
        if MinLen(1) in typing.get_args(sequence):
            with pytest.raises(ConfigError, match=f"{name}: .*expected at least 1 items"):
                dataclasses.replace(part, **{name: ()})
        elif typing.get_origin(sequence) is tuple and typing.get_args(sequence)[-1] is Ellipsis:
            with pytest.raises(ConfigError, match=f"^{name}.*: got"):
                dataclasses.replace(part, **{name: (object(),)})
    if bool in (hint, *typing.get_args(hint)):
        with pytest.raises(ConfigError, match=f"^{name}: got 1, expected bool"):
            dataclasses.replace(part, **{name: 1})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{instruction} {x}", r"expected no fields but \{instruction\} and \{state\}"),
        ("{instruction:>9}", "expected no fields but"),
        ("{instruction", "expected braces that match"),
        ("{instruction} }", "expected braces that match"),
        ("Do it.", r"expected \{instruction\} in it"),
    ],
)
@pytest.mark.parametrize("make", [openvla_tiny, pi05_tiny])
def test_a_template_of_prompts_has_the_fields_there_are(make, template, message):
    with pytest.raises(ValueError, match=f"^prompt_template: got .*{message}"):
        make(prompt_template=template)
