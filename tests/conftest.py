"""Parts that the tests of several rooms share."""

import importlib
import os
import shutil
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

# Modules that tests share are importable from every room's tests, and from the processes that tests start.
for _folder in sorted(path for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name != "__pycache__"):
    sys.path.append(str(_folder))
sys.path.append(str(Path(__file__).parent))
# Commands and benchmarks are no packages: their folders are on the path when they are run.
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("launch", "benchmarks")]

# Tests compile much and run little. This has to be said before JAX is imported, and holds for the processes that tests
# start, too. A flag of the user's own comes last and wins.
_QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones do not know it; here it saves two thirds of what is left
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
# What was compiled once is not compiled again. A folder for each process of the suite and for what that one starts:
# two that write at once would read each other's half-written files.
_COMPILED = tempfile.mkdtemp(prefix="stare_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# rlax imports TensorFlow along where that is installed, and the simulator's renderer crashes in a process that has
# TensorFlow before it has the renderer. Who wants TensorFlow itself imports it later.
sys.modules["tensorflow"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It uses what JAX has deprecated.
    importlib.import_module("rlax")
del sys.modules["tensorflow"]


# Files are shared among processes as they come: with a long one at the end, one would work and the others wait.
_LONG = ("test_end_to_end.py", "test_sharding.py", "test_pi05_sharding.py", "test_pod.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_unconfigure():
    shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture(scope="session")
def widowx_assets():
    """Skips where the files of the WidowX tasks are not on this machine."""
    from stare_jax.envs.maniskill.building import import_mani_skill, require_assets
    from stare_jax.envs.maniskill.scenes import SCENES

    try:
        import_mani_skill()
        require_assets(SCENES["PutCarrotOnPlateInScene-v1"].assets)
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
