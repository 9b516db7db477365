"""Several tasks at once: the function of a row's own task, their turns, and names of stages that they share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax.stages.spec import TaskSpec

TaskSpecs = TaskSpec | tuple[TaskSpec, ...]
"""One task, or several with the same number K of stages; a row's task is its index among them."""


def as_specs(spec: TaskSpecs) -> tuple[TaskSpec, ...]:
    """Returns the tasks as a tuple.

    Raises:
      ValueError: there is none, or they have different numbers of stages.
    """
    specs = (spec,) if isinstance(spec, TaskSpec) else tuple(spec)
    numbers = {one.env_id: one.num_stages for one in specs}
    if len(set(numbers.values())) != 1:
        raise ValueError(f"tasks: got {numbers} stages, expected at least one task, and the same number for all")
    return specs


def by_task(spec: TaskSpecs, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns (task, *args) -> fn(the spec of this task, *args), for one row; under `vmap` every row has its own task.

    Args:
      spec: the tasks.
      fn: (spec, *args) -> arrays, of the same shapes for every task.

    Returns:
      The function; its `task` is an int32 scalar, an index among the tasks, which is not looked at where there is one.
    """
    specs = as_specs(spec)
    branches = [functools.partial(fn, one) for one in specs]
    if len(branches) == 1:
        return lambda task, *args: branches[0](*args)
    return lambda task, *args: jax.lax.switch(task, branches, *args)


def take_turns(spec: TaskSpecs, turns: Sequence[int]) -> np.ndarray | None:
    """Returns the tasks of episodes, int32 `[E]`, where the tasks take turns; None where there is one task.

    Args:
      spec: the tasks.
      turns: `[E]`, the number of each episode's turn; several episodes may share one.
    """
    num_tasks = len(as_specs(spec))
    return np.asarray(turns, np.int32) % num_tasks if num_tasks > 1 else None


def shared_stage_names(specs: Sequence[TaskSpec]) -> tuple[str, ...]:
    """Returns the names of the stages where all tasks have the same ones, otherwise `stage 1` .. `stage K`."""
    if len({spec.stage_names for spec in specs}) == 1:
        return specs[0].stage_names
    return tuple(f"stage {k + 1}" for k in range(specs[0].num_stages))
