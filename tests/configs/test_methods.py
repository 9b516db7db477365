"""Methods of the paper's tables: each sets the fields that it names and no other, and begins where it says."""

import importlib
from pathlib import Path

import pytest

from stare_jax.config import from_dict, to_dict
from stare_jax.runs.config import RunConfig
from stare_jax.runs.directory import differences


@pytest.fixture(autouse=True)
def configs_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


def methods():
    return importlib.import_module("configs.methods")


def values_of(method, *words):
    get_config = importlib.import_module("configs.franka_state").get_config
    values = get_config(",".join(["StackCube-v1", method, *words])).to_dict()
    values.pop("name")
    return values


NAMES = ["sft", "grape", "sta_tpo", "chosen", "ppo", "rl4vla", "pi_rl", "dense"]
NAMES += ["sta_ppo", "sta_ppo_paper", "sta_ppo_jump_start", "sta_ppo_zero", "ipi"]


def test_the_names_are_those_of_the_tables():
    assert list(methods().METHODS) == NAMES
    assert len({method.row for method in methods().METHODS.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_changes_the_fields_that_it_names_and_no_other(name):
    """Its configuration is that of the method it begins from, with a phase more and its own fields."""
    method, model = methods().METHODS[name], ["pi05"] if name == "pi_rl" else []
    values = values_of(name, *model)
    config = from_dict(RunConfig, values)
    assert config.phases[-1] == method.phase
    if not method.start:
        assert config.phases == (method.phase,) and not method.changes
        return
    start = values_of(method.start, *model)
    found = {change.path.removeprefix("config."): change for change in differences(start, values, "config")}
    phases = found.pop("phases")
    assert phases.new == (*phases.old, method.phase)
    assert set(found) <= set(method.changes)
    for path, expected in method.changes.items():
        got = to_dict(config)
        for part in path.split("."):
            got = got[part]
        assert got == expected, path


@pytest.mark.parametrize("name", NAMES)
def test_methods_of_one_phase_set_the_same_fields(name):
    """So none of them depends on a default, or on what a configuration sets for another."""
    method = methods().METHODS[name]
    fields = [set(other.changes) for other in methods().METHODS.values() if other.phase == method.phase]
    assert all(each == fields[0] for each in fields)


def test_no_two_methods_are_the_same():
    """STA-PPO and IPI differ in where they begin, all others in a field."""
    told = {(method.start, tuple(sorted(method.changes.items()))) for method in methods().METHODS.values()}
    assert len(told) == len(NAMES)


def test_the_way_to_a_method():
    assert methods().chain_of("ipi") == ("sft", "sta_tpo", "ipi")
    assert methods().chain_of("ppo") == ("sft", "ppo")
    assert from_dict(RunConfig, values_of("ipi")).phases == ("sft", "tpo", "ppo")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="method: got 'grpo', expected one of sft, grape"):
        methods().set_method(importlib.import_module("configs.franka_state").get_config(), "grpo")
    with pytest.raises(ValueError, match="method: got 'pi_rl' for a model of tokens, expected a flow"):
        values_of("pi_rl")
    with pytest.raises(ValueError, match="variant: got ppo, sta_ppo, expected one of them"):
        values_of("ppo", "sta_ppo")
