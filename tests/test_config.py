"""Dataclasses to dicts and back; every mistake names its field."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Interval, MinLen

from stare_jax.config import (
    ConfigError,
    Count,
    Pattern,
    Positive,
    UserError,
    check_fields,
    check_name,
    from_dict,
    home_path,
    list_choices,
    make_name,
    to_dict,
    user_input,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate: got {self.rate}, expected > 0")


@dataclasses.dataclass(frozen=True)
class Other:
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "a"
    flag: bool = False
    inner: Inner = Inner()
    pairs: tuple[tuple[float, int], ...] = ((0.0, 1),)
    limit: float | None = None
    either: Inner | Other = Inner()

    def __post_init__(self):
        check_fields(self)


def test_round_trip():
    config = Outer(inner=Inner(rate=0.25, sizes=(3,)), pairs=((0.5, 2), (1.0, 3)), limit=2.0, either=Other(width=7))
    assert from_dict(Outer, to_dict(config)) == config


def test_integers_become_floats_where_floats_are_expected():
    config = from_dict(Outer, {"inner": {"rate": 1}, "limit": 3})
    assert type(config.inner.rate) is float and type(config.limit) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "b"}, r"config: unknown field\(s\) nam; expected some of either, flag"),
        ({"inner": {"rat": 1.0}}, r"config\.inner: unknown field\(s\) rat"),
        ({"inner": {"rate": "fast"}}, r"config\.inner\.rate: got 'fast', expected float"),
        ({"inner": {"rate": -1.0}}, r"config\.inner: rate: got -1\.0, expected > 0"),
        ({"inner": 3}, r"config\.inner: got 3, expected the fields of Inner"),
        (None, r"config: got None, expected the fields of \w+"),
        ({"flag": 1}, r"config\.flag: got 1, expected bool"),
        ({"inner": {"sizes": (1, 2.5)}}, r"config\.inner\.sizes\[1\]: got 2\.5, expected int"),
        ({"pairs": ((0.5, 2, 3),)}, r"config\.pairs\[0\]: got 3 items"),
        ({"limit": "none"}, r"config\.limit: got 'none', expected float"),
        ({"either": {"breadth": 1}}, r"config\.either: .*Inner or Other"),
    ],
)
def test_mistakes_name_their_field(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, values)


Colour = Literal["red", "blue"]


@dataclasses.dataclass(frozen=True)
class Painted:
    colour: Colour = "red"
    lining: Colour | None = None
    axis: Literal[0, 1] = 0
    count: Count = 1
    share: Annotated[float, Interval(ge=1, lt=3)] | None = None
    weight: float = 0.0
    is_dry: bool = True
    sizes: Annotated[tuple[tuple[Positive, Count], ...], MinLen(1)] = ((1.0, 1),)
    pattern: Pattern = "a|b"

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Papered:
    colour: Literal["blue", "striped"] = "striped"


@dataclasses.dataclass(frozen=True)
class House:
    front: Painted = Painted()
    back: Painted | Papered = Papered()
    fences: tuple[Colour, ...] = ()
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize("build", [lambda values: Painted(**values), lambda values: from_dict(Painted, values)])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": "green"}, r"colour: got 'green', expected one of \('red', 'blue'\)"),
        ({"colour": None}, r"colour: got None, expected one of"),
        ({"lining": "green"}, r"lining: got 'green', expected one of"),
        ({"axis": True}, r"axis: got True, expected one of \(0, 1\)"),
        ({"axis": 1.0}, r"axis: got 1.0, expected one of \(0, 1\)"),
        ({"count": 0}, r"count: got 0, expected >= 1"),
        ({"count": None}, r"count: got None, expected int"),
        ({"count": True}, r"count: got True, expected int"),
        ({"count": 2.0}, r"count: got 2.0, expected int"),
        ({"count": 2**31}, r"count: got 2147483648, expected at most 2147483647"),
        ({"share": 0.5}, r"share: got 0.5, expected in \[1, 3\) or None"),
        ({"share": 3}, r"share: got 3.0, expected in \[1, 3\) or None"),
        ({"share": "1"}, r"share: got '1', expected float or None"),
        ({"share": float("nan")}, r"share: got nan, expected a finite number in \[1, 3\) or None"),
        ({"weight": float("-inf")}, r"weight: got -inf, expected a finite number"),
        ({"weight": False}, r"weight: got False, expected float"),
        ({"is_dry": 1}, r"is_dry: got 1, expected bool"),
        ({"sizes": ()}, r"sizes: got \(\), expected at least 1 items"),
        ({"sizes": 3.0}, r"sizes: got 3.0, expected a sequence"),
        ({"sizes": ((1.0, 1), (float("inf"), 1))}, r"sizes\[1\]\[0\]: got inf, expected a finite number > 0"),
        ({"pattern": "("}, r"pattern: got '\(', expected a regular expression: missing"),
        ({"pattern": 3}, r"pattern: got 3, expected str"),
    ],
)
def test_fields_are_declared_once_and_checked_wherever_a_config_is_made(build, values, message):
    with pytest.raises(ConfigError, match=rf"^(config\.)?{message}"):
        build(values)


@pytest.mark.parametrize("build", [lambda values: Painted(**values), lambda values: from_dict(Painted, values)])
def test_values_that_are_allowed_become_those_of_the_annotation(build):
    assert build({"colour": "blue", "lining": None, "share": None}) == Painted(colour="blue")
    made = build({"count": np.int64(3), "share": np.float32(1.5), "weight": 2, "sizes": [[1, np.int32(2)]]})
    assert made == Painted(count=3, share=1.5, weight=2.0, sizes=((1.0, 2),))
    assert [type(x) for x in (made.count, made.share, made.weight, made.sizes)] == [int, float, float, tuple]
    hash(made)


def test_a_part_is_one_of_its_own_dataclass():
    assert Outer(either={"width": 7}).either == Other(width=7)
    with pytest.raises(ConfigError, match=r"config.inner: got Other\(width=3\), expected the fields of Inner"):
        from_dict(Outer, {"inner": Other()})


def test_choices_are_listed_for_help_by_path():
    colours = ("red", "blue")
    assert list_choices(House) == {
        "config.front.colour": colours,
        "config.front.lining": colours,
        "config.front.axis": (0, 1),
        "config.back.colour": ("red", "blue", "striped"),
        "config.back.lining": colours,
        "config.back.axis": (0, 1),
        "config.fences": colours,
    }


def test_words_of_a_few_need_neither_quotes_nor_brackets():
    @dataclasses.dataclass(frozen=True)
    class Words:
        phases: tuple[Literal["sft", "ppo"], ...] = ()
        patterns: tuple[str, ...] = ()

    # As ml_collections reads --config.phases=sft,ppo and --config.patterns=a,b.
    assert from_dict(Words, {"phases": ("sft,ppo",), "patterns": ("a,b",)}) == Words(("sft", "ppo"), ("a,b",))
    assert from_dict(Words, {"phases": ("ppo",)}) == from_dict(Words, {"phases": ["ppo"]}) == Words(("ppo",))
    with pytest.raises(ConfigError, match=r"config.phases\[1\]: got 'pp', expected one of"):
        from_dict(Words, {"phases": ("sft,pp",)})


def test_user_input_keeps_the_kind_of_a_users_mistake():
    class OtherError(UserError, ValueError):
        pass

    with pytest.raises(OtherError), user_input():
        raise OtherError("x")
    with pytest.raises(ConfigError, match="^y$"), user_input():
        raise ValueError("y")


def test_fields_that_have_to_be_given_are_named():
    @dataclasses.dataclass(frozen=True)
    class Needs:
        env: str
        depth: int
        width: int = 1

    with pytest.raises(ConfigError, match="^config: got no env, depth, expected all fields that have no default$"):
        from_dict(Needs, {})
    assert from_dict(Needs, {"env": "x", "depth": 2}) == Needs("x", 2)


def test_user_input_says_where_a_field_is_from():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        depth: Count = 1

        def __post_init__(self):
            check_fields(self)

    class FileError(ConfigError):
        pass

    with pytest.raises(ConfigError, match="^config.json: depth: got 0, expected >= 1$"), user_input("config.json"):
        Sizes(depth=0)
    with pytest.raises(FileError, match="^other.json: y$"), user_input("config.json"):
        raise FileError("other.json: y")


def test_a_tilde_is_the_home_directory_in_every_field_and_stays_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path("~/data") == Path("/home/me/data") and home_path("a/~") == Path("a/~")

    @dataclasses.dataclass(frozen=True)
    class Paths:
        folder: str = ""
        files: tuple[str, ...] = ()
        maybe: str | None = None

    built = from_dict(Paths, {"folder": "~", "files": ["~/a", "b~", "~a|b"], "maybe": "~/c"})
    assert built == Paths("/home/me", ("/home/me/a", "b~", "~a|b"), "/home/me/c")
    with pytest.raises(ConfigError, match="config.folder: got '~nobody_at_all/x', expected a path; no such home"):
        from_dict(Paths, {"folder": "~nobody_at_all/x"})
    with pytest.raises(ConfigError, match="got an empty path"):
        home_path("")
    with pytest.raises(ConfigError, match=r"got 'data\\r', expected a path without control characters or line ends"):
        home_path("data\r")  # of a script that Windows has saved
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="loop/x', expected a path; its links lead in a circle"):
        home_path(f"{tmp_path}/loop/x")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "a b", "a\n", "a\0", ".hidden", "x" * 201]
)
def test_names_that_become_parts_of_paths_stay_in_their_folder(name):
    with pytest.raises(ConfigError, match="^study: got .*expected letters, digits"):
        check_name(name, "study")
    assert check_name(make_name(name), "study")


def test_names_are_letters_of_any_script_digits_and_signs():
    for name in ("PushCube-v1", "lr_3e-4", "beta_0.1", "größe", "-x"):
        assert check_name(name, "study") == name
