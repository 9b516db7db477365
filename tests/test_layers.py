"""The structure of the code: which room may import which, which package is allowed where, how long things get.

The rules are data, below; each check takes a file's path and source, so that the checker itself is tested on sources
that break them. Messages read `file:line: what is wrong`.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("stare_jax", "launch", "configs", "benchmarks")

GROUND = ("types", "config", "documents", "sharding")
MATHS = (*GROUND, "logging", "stages", "losses", "targets")
POLICIES = ("models.policy", "models.observation")
BELOW_STATE = (*MATHS, "models", "envs", "rollout", "data")
BELOW_TRAIN = (*BELOW_STATE, "state", "weights")
BELOW_RUNS = (*BELOW_TRAIN, "train", "evaluate", "report")
ALLOWED = {
    "types": (),
    "config": (),
    "documents": ("types", "config"),
    "sharding": ("types", "config"),
    "logging": ("types", "config", "documents", "sharding.pod"),
    "stages": ("types", "config"),
    "losses": ("types",),
    "targets": ("types", "stages", "losses"),
    "envs": (*GROUND, "stages"),
    "models": (*GROUND, "losses"),
    "rollout": (*GROUND, "logging", "stages", "envs.base", "envs.experts.base", "envs.seeds", *POLICIES),
    "data": (*GROUND, "logging", "stages", "envs.base", "envs.experts.base", "envs.seeds", "models", "rollout"),
    "state": (*GROUND, "logging", "models.policy"),
    "weights": (*GROUND, "logging", "models", "state"),
    "train": (*MATHS, "models", "envs.base", "envs.experts.base", "envs.seeds", "rollout", "data", "state"),
    "evaluate": (*MATHS, "envs.base", "envs.seeds", "models.policy", "rollout", "data"),
    "report": (*MATHS, "rollout", "evaluate"),
    "runs": BELOW_RUNS,
    "plan": (*BELOW_RUNS, "runs"),
    "serve": BELOW_RUNS,
}
"""Room of stare_jax -> what it may import of stare_jax, besides itself. Folders outside may import all of it."""

CONFINED = {
    ("torch", "sapien", "mani_skill", "gymnasium"): ("stare_jax/envs/", "benchmarks/"),
    ("tensorflow", "tensorflow_datasets"): ("stare_jax/data/rlds_source.py",),
    ("pyarrow",): ("stare_jax/data/lerobot_format.py",),
    ("orbax",): ("stare_jax/state/storage.py",),
    ("tensorboardX", "wandb"): ("stare_jax/logging",),
    ("absl",): ("launch/",),
    ("flax",): ("stare_jax/models/", "stare_jax/state/train_state.py"),
    ("pydantic",): ("stare_jax/documents/reader.py",),
    ("rlax", "pytest"): (),
}
"""Packages -> the only places, by the beginning of the path, that import them (tests apart)."""

MATHEMATICS = ("jax", "chex", "numpy", "stare_jax")
"""All that stages and losses import besides the standard library."""

NO_ROOMS = {"utils", "util", "common", "misc", "helpers"}
FILE_CAPS = (
    ("stare_jax/models/", 450),
    ("configs/presets.py", 260),
    ("configs/methods.py", 120),
    ("configs/", 90),
    ("", 350),
)
"""Lines of a file, by the beginning of its path; the first that fits counts."""
FUNCTION_CAP, LOOP_CAP = 50, 120
LOOPS = ("train_sft", "train_tpo", "train_ppo", "run_ipi", "collect_episodes", "play")
"""The flat loops; every other function is held to FUNCTION_CAP. Docstrings do not count."""

Check = Callable[[str, str], Iterator[str]]


def room_of(path: str) -> str:
    """`stare_jax/train/sft.py` -> `train`, `stare_jax/types.py` -> `types`, `launch/train.py` -> ``."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "stare_jax" and parts[1] != "__init__" else ""


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) a file imports, at any depth of nesting; `from a import b` counts as `a.b`."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def within(name: str, allowed: str) -> bool:
    """True if a dotted name is `allowed` or inside it."""
    return name == allowed or name.startswith(f"{allowed}.")


def check_direction(path: str, source: str) -> Iterator[str]:
    room = room_of(path)
    for line, name in imports(path, source):
        if not room or not within(name, "stare_jax"):
            continue
        inside = name.removeprefix("stare_jax").removeprefix(".")
        if not any(within(inside, target) for target in (room, *ALLOWED.get(room, ()))):
            listed = ", ".join(ALLOWED.get(room, ())) or "nothing"
            yield f"{path}:{line}: {room} imports {name}; of stare_jax it may import {listed}"


def check_confined(path: str, source: str) -> Iterator[str]:
    for line, name in imports(path, source):
        for packages, places in CONFINED.items():
            if name.split(".")[0] in packages and not path.startswith(places or ("\0",)):
                yield f"{path}:{line}: imports {name}, which belongs in {' or '.join(places) or 'tests'} only"


def check_mathematics(path: str, source: str) -> Iterator[str]:
    if room_of(path) not in ("stages", "losses", "targets"):
        return
    for line, name in imports(path, source):
        package = name.split(".")[0]
        if package not in MATHEMATICS and package not in sys.stdlib_module_names:
            yield f"{path}:{line}: imports {name}; stages and losses import {', '.join(MATHEMATICS)} and the stdlib"


def check_names(path: str, source: str) -> Iterator[str]:
    parts = Path(path).with_suffix("").parts
    if parts[0] == "stare_jax" and NO_ROOMS & set(parts):
        yield f"{path}:1: a module named {', '.join(NO_ROOMS & set(parts))}; name it for what it does"
    if parts[0] == "stare_jax" and len(parts) > 1 and parts[1] not in (*ALLOWED, "__init__"):
        yield f"{path}:1: the room {parts[1]} has no layer; give it a row in ALLOWED"


def check_lengths(path: str, source: str) -> Iterator[str]:
    lines = source.count("\n")
    cap = next(cap for beginning, cap in FILE_CAPS if path.startswith(beginning))
    if lines > cap:
        yield f"{path}:{cap}: {lines} lines, at most {cap}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            cap = LOOP_CAP if node.name in LOOPS else FUNCTION_CAP
            if length > cap:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines without its docstring, at most {cap}"


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def check_encodings(path: str, source: str) -> Iterator[str]:
    """Text files are UTF-8 wherever they are read and written, whatever the machine's own encoding is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and reads_text(node) and "encoding" not in {word.arg for word in node.keywords}:
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)} without an encoding; text is UTF-8 everywhere"


def reads_text(call: ast.Call) -> bool:
    """True for the calls that open a text file in the encoding of the machine, unless a keyword names one."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name in ("read_text", "write_text"):
        return len(call.args) < 1 + (name == "write_text")
    if name != "open":
        return False
    modes = [mode.value for mode in call.args if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    is_builtin = isinstance(call.func, ast.Name)
    return (is_builtin and not modes) or any(set(mode) <= set("rwxa+t") for mode in modes)


CHECKS = (check_direction, check_confined, check_mathematics, check_names, check_lengths, check_encodings)


def project_files() -> dict[str, str]:
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_project_keeps_the_rule(check: Check):
    violations = [violation for path, source in project_files().items() for violation in check(path, source)]
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("package", ["orbax", "tensorboardX", "wandb"])
def test_one_file_imports(package: str):
    importers = {
        path for path, source in project_files().items() for _, name in imports(path, source) if within(name, package)
    }
    assert len(importers) == 1, f"{package} is imported in {sorted(importers)}, expected one file"


def test_one_file_knows_of_processes():
    names = re.compile(r"jax\.(process_\w+|distributed)|import distributed|multihost_utils")
    assert {path for path, source in project_files().items() if names.search(source)} == {"stare_jax/sharding/pod.py"}


VIOLATIONS = [
    (check_direction, "stare_jax/losses/ppo.py", "from stare_jax.stages import potentials\n", ":1: losses imports"),
    (check_direction, "stare_jax/stages/costs.py", "from stare_jax import losses\n", "stare_jax.losses"),
    (check_direction, "stare_jax/models/nn/vit.py", "import stare_jax.envs.base as base\n", "stare_jax.envs.base"),
    (
        check_direction,
        "stare_jax/envs/toys/push.py",
        "def f():\n    from stare_jax.models import vit\n",
        ":2: envs imports",
    ),
    (check_direction, "stare_jax/rollout/collect.py", "from stare_jax.envs import maniskill\n", "envs.maniskill"),
    (check_direction, "stare_jax/data/pairs.py", "from ..train import sft\n", "stare_jax.train.sft"),
    (check_direction, "stare_jax/types.py", "import stare_jax.logging\n", "may import nothing"),
    (check_direction, "stare_jax/report/report.py", "import stare_jax\n", "report imports stare_jax;"),
    (check_confined, "stare_jax/train/sft.py", "import jax\nimport torch.nn as nn\n", ":2: imports torch.nn"),
    (check_confined, "stare_jax/state/train_state.py", "from orbax import checkpoint\n", "storage.py only"),
    (check_confined, "stare_jax/evaluate/protocol.py", "from absl import flags\n", "launch/ only"),
    (check_confined, "configs/quickstart.py", "if True:\n    import wandb\n", ":2: imports wandb"),
    (check_confined, "launch/train.py", "import rlax\n", "tests only"),
    (check_mathematics, "stare_jax/stages/costs.py", "import scipy.special\n", "scipy.special"),
    (check_names, "stare_jax/train/utils.py", "", "name it for what it does"),
    (check_names, "stare_jax/train/common/shapes.py", "", "common"),
    (check_names, "stare_jax/agents/walk.py", "", "no layer"),
    (check_lengths, "stare_jax/train/sft.py", "x = 0\n" * 351, ":350: 351 lines"),
    (check_lengths, "stare_jax/models/nn/vit.py", "x = 0\n" * 451, "at most 450"),
    (check_lengths, "configs/quickstart.py", "x = 0\n" * 91, "at most 90"),
    (check_lengths, "launch/train.py", "def f():\n" + "    x = 0\n" * 50, ":1: f has 51 lines"),
    (check_lengths, "stare_jax/train/sft.py", "def train_sft():\n" + "    x = 0\n" * 120, "at most 120"),
    (check_encodings, "launch/train.py", "x = file.read_text()\n", ":1: file.read_text without an encoding"),
    (check_encodings, "launch/train.py", "file.write_text(x)\n", "file.write_text"),
    (check_encodings, "launch/train.py", "with open(x) as file:\n    pass\n", "open without"),
    (check_encodings, "launch/train.py", "x = file.open('a')\n", "file.open"),
]


@pytest.mark.parametrize(("check", "path", "source", "said"), VIOLATIONS)
def test_checker_catches(check: Check, path: str, source: str, said: str):
    violations = list(check(path, source))
    assert len(violations) == 1
    assert violations[0].startswith(f"{path}:")
    assert said in violations[0]


LAWFUL = [
    ("stare_jax/stages/costs.py", "import math\nimport jax.numpy as jnp\nfrom stare_jax.types import Array\n"),
    ("stare_jax/stages/__init__.py", "from .costs import stage_costs\nfrom . import spec\n"),
    ("stare_jax/rollout/collect.py", "from stare_jax.envs.base import VecEnv\nfrom stare_jax.envs import base\n"),
    ("stare_jax/envs/maniskill/simulator.py", "import torch\nfrom stare_jax.stages import get_task\n"),
    ("stare_jax/runs/ipi.py", "from stare_jax.evaluate import protocol\nfrom stare_jax import envs\n"),
    ("stare_jax/__init__.py", "from stare_jax.stages import separate\n"),
    ("launch/train.py", "from absl import app\nfrom stare_jax.runs.ipi import run_ipi\n"),
    ("configs/presets.py", "import ml_collections\n" + "x = 0\n" * 200),
    ("stare_jax/models/nn/vit.py", "x = 0\n" * 450),
    ("launch/train.py", "a.read_text('utf-8')\nb.open('rb')\nos.open(c, os.O_RDONLY)\nopen(d, encoding='utf-8')\n"),
    ("stare_jax/train/sft.py", "def f():\n    '''a\n" + "    b\n" * 200 + "    '''\n" + "    x = 0\n" * 49),
]


@pytest.mark.parametrize(("path", "source"), LAWFUL)
def test_checker_lets_pass(path: str, source: str):
    assert [violation for check in CHECKS for violation in check(path, source)] == []


def test_no_two_modules_of_the_tests_share_a_name():
    """`tests/conftest.py` puts every room's folder on one path: of two modules with one name, the first is imported."""
    names = Counter(path.stem for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
