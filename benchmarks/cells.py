"""A grid of measurements in a file that grows by a line with each, what is there being not measured again.

A cell is an arm on a task, with a few draws of settings and a few seeds. Arms are tuned on tuning seeds, the same
draws for all; then the best and the median draw of each run with fresh seeds.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stare_jax.logging import progress, say

FIRST_FRESH_SEED = 1000
Cell = dict[str, Any]
Row = dict[str, Any]


class Settings(NamedTuple):
    """Size of an experiment."""

    num_blocks: int
    """blocks of draws; a block has one number of epochs and is one cell."""
    draws_per_block: int = 4
    num_tuning_seeds: int = 3
    num_fresh_seeds: int = 30

    @property
    def num_draws(self) -> int:
        return self.num_blocks * self.draws_per_block

    @property
    def tuning_seeds(self) -> list[int]:
        return list(range(self.num_tuning_seeds))

    @property
    def fresh_seeds(self) -> list[int]:
        return list(range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + self.num_fresh_seeds))


# ---- File -----------------------------------------------------------------------------------------------------------
def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file; a last line that an interruption cut short is left out, and written over."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def run_cells(
    cells: Sequence[Cell],
    measure: Callable[[Cell], Row],
    path: Path,
    *,
    only_print: bool = False,
    deadline: float | None = None,
) -> bool:
    """Measures the cells that the file has no row of, in order, and appends a row for each.

    Args:
        cells: JSON-able descriptions, which identify a cell; progress counts their draws and `seeds`.
        measure: all that a cell's row has beside its description; JSON-able.
        path: JSON lines.
        only_print: print the cells that are left, and measure none.
        deadline: `time.time()` after which no cell is begun; None for none.

    Returns:
        Whether every cell has a row.
    """
    done = {_name(row["cell"]) for row in read_rows(path)}
    left = [cell for cell in cells if _name(cell) not in done]
    if only_print:
        for cell in left:
            print(_name(cell))
        return not left
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress(sum(map(_num_runs, left)), cells[0]["task"], "run") as bar:
        for cell in left:
            if deadline is not None and time.time() > deadline:
                return False
            started, cpu = time.time(), time.process_time()
            row = {"cell": cell, **measure(cell)}
            row |= {"seconds": round(time.time() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            bar.update(_num_runs(cell))
    return True


def _name(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _num_runs(cell: Cell) -> int:
    return len(cell["draws"]) * len(cell["seeds"])


# ---- Tuning, then fresh seeds ---------------------------------------------------------------------------------------
def run_task(
    task: str,
    arms: Sequence[str],
    measure: Callable[[Cell], Row],
    path: Path,
    settings: Settings,
    *,
    size: dict[str, int],
    **options: Any,
) -> None:
    """Tunes arms on a task, then runs the best and the median draw of each with fresh seeds.

    Args:
        task: name.
        arms: names.
        measure: of `run_cells`; a row has `success`, rates whose mean over the last axis is tuned, a list for each
            draw and seed, draws first.
        path: of `run_cells`.
        settings: size of the experiment.
        size: part of every cell: other sizes make other cells.
        options: of `run_cells`.
    """
    if not run_cells(tuning_cells(task, arms, settings, size), measure, path, **options):
        return say(f"{task}: fresh seeds follow when all draws are tuned")
    for draws in choose_draws(tuned_scores(read_rows(path), task, arms, settings, size)):
        cells = [_cell(task, arm, [draws[arm]], settings.fresh_seeds, size) for arm in arms]
        if not run_cells(cells, measure, path, **options):
            return say(f"{task}: some runs with fresh seeds are left")


def tuning_cells(task: str, arms: Sequence[str], settings: Settings, size: dict[str, int]) -> list[Cell]:
    """Returns the cells of tuning, in an order that keeps all arms level."""
    blocks = np.arange(settings.num_draws).reshape(settings.num_blocks, -1).tolist()
    return [_cell(task, arm, block, settings.tuning_seeds, size) for block, arm in itertools.product(blocks, arms)]


def _cell(task: str, arm: str, draws: Sequence[int], seeds: Sequence[int], size: dict[str, int]) -> Cell:
    return {"task": task, "arm": arm, "draws": list(draws), "seeds": list(seeds), **size}


def tuned_scores(
    rows: Sequence[Row], task: str, arms: Sequence[str], settings: Settings, size: dict[str, int]
) -> dict[str, np.ndarray]:
    """Returns the mean score of each draw that all arms have been tuned with, `[D]` an arm."""
    scores: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for row in rows:
        cell = row["cell"]
        if cell["arm"] in scores and cell == _cell(task, cell["arm"], cell["draws"], settings.tuning_seeds, size):
            success = np.reshape(row["success"], (len(cell["draws"]), settings.num_tuning_seeds, -1))
            scores[cell["arm"]] |= dict(zip(cell["draws"], success.mean(axis=(1, 2)), strict=True))
    num_draws = 0
    while all(num_draws in by_draw for by_draw in scores.values()):
        num_draws += 1
    return {arm: np.array([by_draw[draw] for draw in range(num_draws)]) for arm, by_draw in scores.items()}


def choose_draws(scores: dict[str, np.ndarray]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the best and the median draw of each arm."""
    orders = {arm: np.argsort(-by_draw, kind="stable") for arm, by_draw in scores.items()}
    best = {arm: int(order[0]) for arm, order in orders.items()}
    return best, {arm: int(order[(len(order) - 1) // 2]) for arm, order in orders.items()}


class Result(NamedTuple):
    """Runs of an arm on a task with fresh seeds."""

    best: Row
    best_draw: int
    median: Row | None
    """None before it has run."""
    median_draw: int
    score: float
    """score of the best draw with the tuning seeds."""


def read_results(
    rows: Sequence[Row], task: str, arms: Sequence[str], settings: Settings, size: dict[str, int]
) -> dict[str, Result]:
    """Returns the arms whose best draw has run with fresh seeds; none before any draw is tuned for all arms."""
    scores = tuned_scores(rows, task, arms, settings, size)
    if not all(map(len, scores.values())):
        return {}
    by_name = {_name(row["cell"]): row for row in rows}

    def find(arm: str, draw: int) -> Row | None:
        return by_name.get(_name(_cell(task, arm, [draw], settings.fresh_seeds, size)))

    best, median = choose_draws(scores)
    return {
        arm: Result(row, best[arm], find(arm, median[arm]), median[arm], float(scores[arm].max()))
        for arm in arms
        if (row := find(arm, best[arm])) is not None
    }
