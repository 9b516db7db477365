"""Tasks on the toys: which toy, how long its steps are, and how good the imitation is that training starts from."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from toy_start import make_start

from stare_jax.envs.toys import TOYS
from stare_jax.logging import say

SIZES, STARTS = (15, 8), (0, 10, 30, 60)
"""Millimetres of a step; success of the start in per cent, about."""
IMITATION_STEPS = {
    ("push", 15): (240, 420, 620),
    ("push", 8): (240, 400, 600),
    ("place", 15): (580, 1130, 1800),
    ("place", 8): (590, 1200, 1900),
    ("lift", 15): (200, 700, 2200),
    ("lift", 8): (260, 820, 2250),
}
"""Steps of imitation after which each of `STARTS` but the first is reached, see `calibrate`."""
START_ROWS = 3
"""Seeds of one call of the program that makes starts."""
ROWS = 12
"""Draws times seeds of one call of a program that trains."""


class Task(NamedTuple):
    """A toy, the length of its steps, and the imitation that training starts from."""

    toy: str
    millimetres: int
    start: int
    """success of the imitation in per cent, about."""

    @property
    def name(self) -> str:
        return f"{self.toy}-{self.millimetres}mm-{self.start}"

    @property
    def max_step(self) -> np.float32:
        return np.float32(self.millimetres / 1000)

    @property
    def num_imitation_steps(self) -> int:
        return IMITATION_STEPS[self.toy, self.millimetres][STARTS.index(self.start) - 1] if self.start else 0


TASKS = {task.name: task for task in itertools.starmap(Task, itertools.product(TOYS, SIZES, STARTS))}


@functools.cache
def _start(toy: str):
    return make_start(TOYS[toy])


@functools.lru_cache(maxsize=4)
def start_params(task: Task, seeds: tuple[int, ...], num_steps: int | None = None) -> tuple[Any, np.ndarray]:
    """Returns the parameters that training starts from, leaves `[S, ...]`, and the success of each, `[S]`.

    Args:
        task: the task.
        seeds: of weights, demonstrations and their order.
        num_steps: of imitation; None for the task's own number.
    """
    num_steps = task.num_imitation_steps if num_steps is None else num_steps
    parts = []
    for first in range(0, len(seeds), START_ROWS):
        rows = np.resize(np.array(seeds[first : first + START_ROWS]), START_ROWS)
        parts.append(jax.device_get(_start(task.toy)(rows, np.int32(num_steps), task.max_step)))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(seeds)], *parts)


def run_rows(fn: Callable, task: Task, seeds: Sequence[int], hyper: Sequence[NamedTuple]) -> Any:
    """Runs a compiled program for every draw of settings and every seed, `ROWS` of them at a time.

    A seed has the same parameters and the same key with every draw. Whatever the number of rows, one program serves.

    Args:
        fn: (params, keys, settings), leaves `[ROWS, ...]` -> leaves `[ROWS, ...]`.
        task: the task.
        seeds: S of them.
        hyper: D draws of settings, whose `num_epochs` are equal and stay a scalar.

    Returns:
        NumPy leaves `[D * S, ...]`, draws first.
    """
    params, _ = start_params(task, tuple(seeds))
    params = jax.tree.map(lambda x: np.concatenate([x] * len(hyper)), params)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(np.tile(seeds, len(hyper)))
    settings = jax.tree.map(lambda *x: np.repeat(np.float32(x), len(seeds)), *hyper)
    parts = []
    for first in range(0, len(keys), ROWS):
        rows = np.arange(first, first + ROWS) % len(keys)
        *inputs, drawn = jax.tree.map(lambda x, rows=rows: x[rows], (params, keys, settings))
        drawn = drawn._replace(num_epochs=np.int32(hyper[0].num_epochs))
        parts.append(jax.device_get(fn(*inputs, drawn)))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(keys)], *parts)


def calibrate(tasks: Sequence[Task]) -> None:
    """Prints the success of imitations by the number of their steps, mean and range of three seeds."""
    for task in dict.fromkeys(task._replace(start=0) for task in tasks):
        for num_steps in (0, 200, 400, 600, 800, 1100, 1400, 2000):
            _, success = start_params(task, tuple(range(3)), num_steps)
            say(f"{task.name} {num_steps:5d} steps: {success.mean():.3f} [{success.min():.3f}, {success.max():.3f}]")
