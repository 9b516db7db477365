"""States in which the WidowX episodes of a batch begin: with their objects at rest, as on the CPU.

ManiSkill lets objects settle in every reset, by steps of the physics of all environments. Here the CPU's simulator does
it once for every start, in processes of its own: where PhysX computes on a GPU it cannot begin anew on the CPU. The
states are kept in the user's cache, and a reset of the batch sets them.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stare_jax.envs.base import SimulatorError
from stare_jax.envs.config import EnvConfig
from stare_jax.envs.maniskill.building import import_mani_skill, require_assets
from stare_jax.envs.maniskill.panda_lite import cache_root, report_to_stderr
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.pool.workers import worker_environment
from stare_jax.envs.seeds import DEMO_SEEDS, is_for_evaluation

NUM_TRAINING_STARTS = 1000
"""starts of all episodes that are not of the evaluation; one takes the CPU a seventh of a second, once"""
MAX_PROCESSES, STARTS_OF_A_PROCESS = 8, 32
RECIPE = 1  # Raise it whenever other states come out for the same settings.

States = Mapping[str, Mapping[str, np.ndarray]]
"""ManiSkill's states of K environments: "actors" or "articulations" -> name -> float32 `[K, N]`"""


class Rests:
    """States at rest by the seed whose episode, on the CPU, begins there."""

    def __init__(self, seeds: Sequence[int], states: States, num_official: int):
        """
        Args:
            seeds: of S starts.
            states: of the starts, leaves `[S, N]`.
            num_official: number of starts in the task's official evaluation.
        """
        self._row = {int(seed): row for row, seed in enumerate(seeds)}
        self._states, self._num_official = states, num_official

    def of(self, seeds: Sequence[int]) -> States:
        """Returns the first states of the episodes of K seeds, leaves `[K, N]`."""
        rows = [self._row[start_of(int(seed), self._num_official)] for seed in seeds]
        return {kind: {name: state[rows] for name, state in each.items()} for kind, each in self._states.items()}


def start_of(seed: int, num_official: int) -> int:
    """Returns the seed whose first state on the CPU is that of an episode in a batch.

    Episodes of the evaluation go through the official starts, as on the CPU. The others take
    `NUM_TRAINING_STARTS` of the many jittered ones in turn.
    """
    return seed % num_official if is_for_evaluation(seed) else DEMO_SEEDS + seed % NUM_TRAINING_STARTS


def all_starts(num_official: int) -> list[int]:
    """Returns the values of `start_of`."""
    return [*range(num_official), *range(DEMO_SEEDS, DEMO_SEEDS + NUM_TRAINING_STARTS)]


def load_rests(
    config: EnvConfig, seeds: Sequence[int] | None = None, report: Callable[[str], None] = report_to_stderr
) -> Rests:
    """Returns the states of a task's starts, from the cache, or by simulation, which takes a minute or two once.

    Those of a task of one's own are computed whenever a batch starts: its code may have changed.

    Args:
        config: of the batch.
        seeds: of the starts, values of `start_of`; None for all of them.
        report: is told in one line when states are about to be computed, and in another when they are.

    Raises:
        MissingAssetsError: the task's assets are missing.
        SimulatorError: a process that computes them has failed; its own message is on the standard error.
    """
    import_mani_skill()
    require_assets(config.scene.assets)
    num_official = config.scene.num_starts
    seeds = all_starts(num_official) if seeds is None else seeds
    path = cache_root() / "rests" / f"{config.env_id}-{_cache_key(config, seeds)}.npz"
    if config.task or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as scratch:
            states = _settle_in_processes(config, seeds, Path(scratch), report)
            np.savez(Path(scratch) / "states.npz", **states)
            (Path(scratch) / "states.npz").rename(path)  # Nobody sees half of it.
    return Rests(seeds, nested(_read(path)), num_official)


def settle(simulator: Simulator, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the states in which episodes of a simulator on the CPU begin: "kind/name" -> float32 `[S, N]`."""
    states = []
    for seed in seeds:
        simulator.reset(seed, reproducible=True)
        state = simulator.env.scene.get_sim_state()
        states.append({f"{kind}/{name}": row[0].numpy() for kind in state for name, row in state[kind].items()})
    return {name: np.stack([state[name] for state in states]) for name in states[0]}


def nested(states: Mapping[str, np.ndarray]) -> States:
    """Returns what `settle` returned as ManiSkill has it."""
    nested: dict[str, dict[str, np.ndarray]] = {}
    for key, state in states.items():
        kind, name = key.split("/", 1)
        nested.setdefault(kind, {})[name] = state
    return nested


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _cache_key(config: EnvConfig, seeds: Sequence[int]) -> str:
    """Returns a short text that differs where states may differ."""
    from mani_skill.utils.assets.data import DATA_SOURCES

    versions = [importlib.metadata.version(package) for package in ("mani_skill", "sapien")]
    folders = [Path(DATA_SOURCES[name].output_dir / DATA_SOURCES[name].target_path) for name in config.scene.assets]
    files = [(path.relative_to(folder), path) for folder in folders for path in sorted(folder.rglob("*"))]
    assets = [(name.as_posix(), path.stat().st_size) for name, path in files if path.is_file()]
    settings = repr((RECIPE, config.env_id, config.jitter, versions, assets, list(seeds)))
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


# ---- Processes -------------------------------------------------------------------------------------------------------

_PROCESS = "from stare_jax.envs.maniskill.rests import main; main()"


def _settle_in_processes(
    config: EnvConfig, seeds: Sequence[int], folder: Path, report: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Returns what `settle` returns, computed by some processes; they exchange files in an empty folder."""
    config = dataclasses.replace(config, backend="cpu", num_workers=1, envs_per_worker=1, image_size=None)
    number = min(os.cpu_count() or 1, MAX_PROCESSES, math.ceil(len(seeds) / STARTS_OF_A_PROCESS))
    report(f"{config.env_id}: objects settle in {len(seeds)} starts, by {number} processes (a minute or two, once)")
    begun, processes, results = time.monotonic(), [], []
    try:
        for k, share in enumerate(np.array_split(np.array(seeds), number)):
            request, result = folder / f"{k}.pickle", folder / f"{k}.npz"
            request.write_bytes(pickle.dumps((config, sys.path, share.tolist())))
            command = [sys.executable, "-c", _PROCESS, str(request), str(result)]
            processes.append(subprocess.Popen(command, env=worker_environment(), stdin=subprocess.DEVNULL))
            results.append(result)
        for process in processes:
            if status := process.wait():
                raise SimulatorError(f"{config.env_id}: settling of its objects failed, exit status {status}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    report(f"they settled in {time.monotonic() - begun:.0f} s")
    shares = [_read(result) for result in results]
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


def main() -> None:
    """Settles the objects of some starts in a process of its own; the arguments are the files of request and result."""
    from stare_jax.envs.pool.worker import load_simulator

    request, result = sys.argv[1:]
    config, path, seeds = pickle.loads(Path(request).read_bytes())
    sys.path.extend(folder for folder in path if folder not in sys.path)  # A task of one's own may lie there.
    load_simulator()
    simulator = Simulator(config)
    np.savez(result, **settle(simulator, seeds))
    simulator.close()
