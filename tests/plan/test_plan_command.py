"""Command lines of launch/plan.py that do not fit, each of which is one line before anything is compiled."""

import importlib.util

import plan
import pytest

from stare_jax.plan.chips import CHIPS, parse_devices, parse_topology

QUICKSTART = "configs/quickstart.py"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The command prepares its process's environment, and this process goes on with others' tests."""
    for name in plan._NO_HARDWARE:
        monkeypatch.setenv(name, "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology=v9z:2x4"],
            "--topology: got 'v9z:2x4', expected KIND:AxB or KIND:AxBxC, KIND one of v5e, ",
        ),
        (["--topology=v5e"], "--topology: got 'v5e', expected KIND:AxB"),
        (
            ["--devices=8"],
            "--devices: got '8', expected NUMBERxMEMORY such as 8x80GB, or NUMBERxKIND, KIND one of",
        ),
        (["--devices=0x80GB"], "NUMBER 1 to 512"),
        (["--devices=1xv5e"], "--devices: got '1xv5e', expected NUMBERxMEMORY"),
        (["--topology=v5e:2x4"], "--topology: libtpu is not installed, which compiles for TPUs; pip install libtpu"),
        (
            ["--devices=1x1GB", "--programs=sample,nothing"],
            "--programs: got nothing, expected some of sample,sft,",
        ),
        (["--devices=1x1GB", "--config.mesh.fsdp=4"], "expected at most 1 device(s); --config.mesh.fsdp=1"),
        (["--devices=1x1GB", "--config.ppo.num_steps=0"], "num_steps: got 0, expected >= 1 or None"),
        (["--devices=1x1GB", "--config.model.camera=wrist"], "config.model.cameras: sees the cameras ['wrist']"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert plan.main([f"--config={QUICKSTART}", f"--kept={tmp_path}", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_devices_have_the_memory_that_is_given_or_that_of_their_kind():
    assert parse_devices("8x80GB")[1:] == (8, 80e9, None)
    assert parse_devices("1xH200")[1:] == (1, 141e9, CHIPS["H200"])
    assert parse_topology("v5p:4x4x4")[1:] == (None, 95 * 2**30, CHIPS["v5p"])


@pytest.mark.parametrize(
    ("topology", "links", "rate"),
    [
        ("v5e:1x1", 1, 45e9),
        ("v5e:2x4", 1 + 2, 45e9),
        ("v5e:4x4", 2 + 2, 45e9),
        ("v5p:2x2x1", 1 + 1, 90e9),
        ("v5p:2x2x2", 3, 90e9),
        ("v6e:16x16", 4, 90e9),
    ],
)
def test_a_chip_sends_over_as_many_links_as_its_slice_has_directions(topology, links, rate):
    assert parse_topology(topology).chip.link == links * rate
