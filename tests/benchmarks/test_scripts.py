"""Benchmarks that import configurations say where these are: no installed package has them."""

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
