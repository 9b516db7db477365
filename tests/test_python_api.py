"""`import stare_jax` shows the rooms, and costs little."""

import subprocess
import sys
from pathlib import Path

import pytest

import stare_jax

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "sapien", "mani_skill", "tensorflow", "jax", "flax", "orbax")


def run(lines):
    """Runs lines of Python in a process of their own, and returns what they print."""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_itself_imports_nothing_heavy():
    heavy = f"print([name for name in {HEAVY} if name in sys.modules])"
    assert run(f"import sys, stare_jax; assert 'stages' in dir(stare_jax); {heavy}") == "[]"
    simulators = HEAVY[:4]
    rooms = "stare_jax.runs; stare_jax.train; stare_jax.envs; stare_jax.models; stare_jax.report; stare_jax.weights"
    imports = "import stare_jax.runs.ipi, stare_jax.weights.load"
    looked = f"print([name for name in {simulators} if name in sys.modules])"
    assert run(f"import sys, stare_jax; {rooms}; {imports}; {looked}") == "[]"


def test_every_room_is_there_and_named():
    folders = {path.parent.name for path in (ROOT / "stare_jax").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "stare_jax").glob("*.py")} - {"__init__"}
    assert set(stare_jax.__all__) == folders | files
    for name in stare_jax.__all__:
        assert getattr(stare_jax, name).__name__ == f"stare_jax.{name}"
        assert getattr(stare_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'rooms'"):
        _ = stare_jax.rooms
