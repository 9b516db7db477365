"""Tasks by name: the eight of the paper, the toys, and tasks of a user's own, each a Python file outside the library.

A task of one's own is named and never pickled: the processes of the simulators import the same file or module.
"""

import functools
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.config import ConfigError, check_name, home_path
from stare_jax.envs.experts import panda, widowx
from stare_jax.envs.experts.base import Expert, ExpertFn, limit_translations
from stare_jax.envs.maniskill.scenes import SCENES, Camera, Scene
from stare_jax.envs.toys import CAMERA, TOY_TASKS, Toy
from stare_jax.stages import TASKS, TaskSpec, get_task
from stare_jax.types import Signals

_IMPORTING = threading.RLock()  # a thread that finds a module finds it whole
TASK_NAME = "TASK"
TASK_NAMES = (*TASKS, *TOY_TASKS)
"""The tasks that need no file: the eight of the paper, and the toys."""


def no_memory() -> None:
    """Returns the memory of an expert that needs none."""
    return None


class ToyScene(NamedTuple):
    """The part of `maniskill.scenes.Scene` that a toy has as well; its objects and goal are the toy's own."""

    toy: Toy
    camera: Camera
    horizon: int
    action_dims: Mapping[str, int]
    action_scale: tuple[float, ...]
    robot: str = "toy"
    num_starts: int = 0


class Task(NamedTuple):
    """One task of the simulator."""

    spec: TaskSpec
    """stages, instruction, and the id under which the simulator knows the task."""
    scene: Scene | ToyScene
    """robot, camera, objects and goal."""
    expert: ExpertFn | None = None
    """closed-loop function in the scene's default control mode; None where no demonstrations are to be collected."""
    expert_init: Callable[[], Any] = no_memory
    """() -> the expert's memory of an episode that begins."""


def load_task(name: str) -> Task:
    """Returns the task of a name.

    Args:
        name: one of `TASK_NAMES`; the path of a Python file, which ends in `.py`; or a module, `package.module`, found
            on Python's path or in the working directory. File and module define `TASK`.

    Raises:
        ConfigError: there is no such task, the file cannot be imported, it has no `TASK`, or parts of the task do not
            fit each other.
    """
    return _BUILT_IN[name] if name in _BUILT_IN else _load(str(home_path(name)))


def make_expert(name: str, *, limit: float = 1.0) -> Expert:
    """Returns the expert of a task, for the task's default control mode.

    Args:
        name: of the task, as for `load_task`.
        limit: largest component of a translation, as a fraction of its `action_scale`: below 1 the expert moves more
            slowly and seldom at the end of its range. Longer translations keep their direction.

    Raises:
        ConfigError: there is no such task, or the task has no expert.
        ValueError: the limit is not a fraction.
    """
    task = load_task(name)
    if task.expert is None:
        raise ConfigError(f"task: {name} has no expert, expected one that acts; see docs/tasks.md")
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit: got {limit}, expected 0 < limit <= 1")
    scale = task.scene.action_scale
    act = task.expert if limit == 1.0 else limit_translations(task.expert, limit, scale)
    return Expert(task.expert_init, act, scale)


@functools.cache
def _load(name: str) -> Task:
    is_file = name.endswith(".py") or os.sep in name
    if is_file and not Path(name).is_file():
        raise ConfigError(f"task: got {name!r}, expected a Python file; there is none in {Path.cwd()}")
    try:
        module = _import_file(Path(name)) if is_file else _import_module(name)
    except ConfigError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise ConfigError(f"task: {name} cannot be imported: {reason}") from error
    try:
        return _checked(getattr(module, TASK_NAME, None), name)
    except ConfigError:
        if is_file:  # It is read anew when it has been put right.
            sys.modules.pop(module.__name__, None)
        raise


def _import_file(path: Path) -> ModuleType:
    """Imports a file under a name that no other file has, once: what it registers in the simulator is there then."""
    path = path.resolve()
    module_name = f"stare_jax_task:{path}"
    with _IMPORTING:
        if module_name in sys.modules:
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # Dataclasses look their module up.
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module


def _import_module(name: str) -> ModuleType:
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # A script has its own folder there in place of the working directory.
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{missing}."):
            raise  # The module exists, and one that it imports does not.
        raise ConfigError(
            f"task: got {name!r}, expected one of {', '.join(TASK_NAMES)}, a Python file (path/to/task.py), or a "
            "module (package.module) on Python's path or in the working directory"
        ) from None


def _checked(task: Any, name: str) -> Task:
    """Returns a task of one's own after checking that its parts are there and fit each other."""
    if not isinstance(task, Task):
        got = "nothing" if task is None else f"a {type(task).__name__}"
        raise ConfigError(
            f"task: {name}: {TASK_NAME}: got {got}, expected {TASK_NAME} = Task(spec, scene, expert), of "
            "stare_jax.envs (docs/tasks.md)"
        )
    for field, kind in (("spec", TaskSpec), ("scene", Scene)):
        if not isinstance(getattr(task, field), kind):
            got = type(getattr(task, field)).__name__
            raise ConfigError(f"task: {name}: {TASK_NAME}.{field}: got a {got}, expected a {kind.__name__}")
    if task.expert is not None and not callable(task.expert):
        got = type(task.expert).__name__
        raise ConfigError(f"task: {name}: {TASK_NAME}.expert: got a {got}, expected a function, or None")
    check_name(task.spec.env_id, f"task: {name}: {TASK_NAME}.spec.env_id")
    mode, num_actions = next(iter(task.scene.action_dims.items()))
    if len(task.scene.action_scale) != num_actions:
        raise ConfigError(
            f"task: {name}: {TASK_NAME}.scene.action_scale: got {len(task.scene.action_scale)} numbers, expected "
            f"{num_actions}, as many as {mode} has"
        )
    return task


_EXPERTS: Mapping[str, tuple[ExpertFn, Callable[[], Any]]] = MappingProxyType(
    {
        "PushCube-v1": (panda.push_cube, no_memory),
        "PullCube-v1": (panda.pull_cube, no_memory),
        "StackCube-v1": (panda.stack_cube, no_memory),
        "LiftPegUpright-v1": (panda.lift_peg, no_memory),
        "PutSpoonOnTableClothInScene-v1": (widowx.make_act(widowx.SPOON), no_memory),
        "PutCarrotOnPlateInScene-v1": (widowx.make_act(widowx.CARROT), no_memory),
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1": (widowx.make_act(widowx.CUBE), no_memory),
        "PutEggplantInBasketScene-v1": (widowx.make_act(widowx.EGGPLANT), no_memory),
    }
)


def _toy_task(toy: Toy) -> Task:
    """Returns a toy as a task; its actions are fractions of the largest step."""

    def act(signals: Signals, memory: Any) -> tuple[np.ndarray, Any]:
        return toy.expert(jax.tree.map(lambda leaf: np.asarray(leaf)[None], signals))[0], memory

    scene = ToyScene(toy, Camera(CAMERA, (64, 64)), toy.horizon, {"toy": toy.action_dim}, (1.0,) * toy.action_dim)
    return Task(toy.spec, scene, act)


_BUILT_IN: Mapping[str, Task] = MappingProxyType(
    {env_id: Task(get_task(env_id), SCENES[env_id], *_EXPERTS[env_id]) for env_id in TASKS}
    | {env_id: _toy_task(toy) for env_id, toy in TOY_TASKS.items()}
)
