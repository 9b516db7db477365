"""Dataclasses to dicts and back; every mistake names its field."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from stare_jax.config import (
    ConfigError,
    UserError,
    check_at_least,
    check_choices,
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
    count: int = 1
    share: float | None = None

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, "count", "share")


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
        ({"count": 0}, r"count: got 0, expected >= 1"),
        ({"share": 0.5}, r"share: got 0.5, expected >= 1 or None"),
        ({"share": float("nan")}, r"share: got nan, expected >= 1 or None"),
    ],
)
def test_choices_are_said_once_and_checked_wherever_a_config_is_made(build, values, message):
    with pytest.raises(ValueError, match=message):
        build(values)


def test_choices_that_are_allowed_pass():
    assert from_dict(Painted, {"colour": "blue", "lining": None, "share": None}) == Painted(colour="blue")


def test_choices_are_listed_for_help_by_path():
    colours = ("red", "blue")
    assert list_choices(House) == {
        "config.front.colour": colours,
        "config.front.lining": colours,
        "config.back.colour": ("red", "blue", "striped"),
        "config.back.lining": colours,
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


def test_a_tilde_is_the_home_directory_in_every_field_and_stays_elsewhere(monkeypatch):
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
