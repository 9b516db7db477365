"""Benchmarks that import configurations say where these are: no installed package has them. What cuDNN takes."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = {path.name: path.read_text("utf-8") for path in Path(__file__).resolve().parents[2].glob("benchmarks/*.py")}
USERS = [name for name, text in SCRIPTS.items() if "from configs" in text and "__main__" in text]


@pytest.mark.parametrize("name", USERS)
def test_a_script_finds_the_configurations(name):
    text = SCRIPTS[name]
    assert 0 < text.find("sys.path") < text.index("from configs")


def test_there_are_some():
    assert {"imitation.py", "rebuild.py"} <= set(USERS)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_cudnn_with_float32_is_refused_in_a_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).parse(["--attention=cudnn", "--dtype=float32"])
    assert stopped.value.code == 2 and "got cudnn with float32" in capsys.readouterr().err


def test_a_gpu_measures_the_reduced_openvla_with_the_attention_of_float32(monkeypatch):
    openvla = importlib.import_module("openvla")
    monkeypatch.setattr(openvla.Path, "exists", lambda path: True)
    chosen = [openvla.parse([size]) for size in ("--size=reduced", "--size=7b")]
    assert [(args.dtype, args.attention) for args in chosen] == [("float32", "xla"), ("bfloat16", "cudnn")]
