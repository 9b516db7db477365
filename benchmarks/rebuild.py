"""Measures what the reproducible reset costs with which every environment begins an iteration, on PushCube from images.

    python benchmarks/rebuild.py --json=benchmarks/results/rebuild_cpu.json

All are medians of processor time in one process, which other programs on the machine change little. Its modules are
kept out of garbage collection, as in the processes of a pool: a rebuild collects garbage.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stare_jax.config import from_dict, home_path
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.pool.worker import load_simulator
from stare_jax.logging import replace_text
from stare_jax.runs.config import RunConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=home_path, help="file for the numbers")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from configs import quickstart

    values = quickstart.get_config().to_dict()
    config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
    load_simulator()
    gc.freeze()
    simulator = Simulator(config.env)
    rest = np.zeros(config.env.action_dim, np.float32)

    def seconds_of(work: Callable[[int], object]) -> float:
        times = []
        for i in range(-3, arguments.rounds):  # the first three warm up
            begin = time.process_time()
            work(max(i, 0))
            times.append(time.process_time() - begin)
        return statistics.median(times[3:])

    rebuild = seconds_of(lambda seed: simulator.reset(seed, reproducible=True))
    reset = seconds_of(lambda seed: simulator.reset(seed))
    step = seconds_of(lambda _: simulator.step(rest))
    simulator.close()
    num_episodes, horizon, num_envs = config.ppo.num_episodes, config.env.horizon, config.env.num_envs
    episodes = num_episodes * (reset + horizon * step)
    more = num_envs * (rebuild - reset)
    result = {
        "command": "python benchmarks/rebuild.py",
        "num_cores": os.cpu_count(),
        "rebuild_s": rebuild,
        "reset_s": reset,
        "step_s": step,
        "num_envs": num_envs,
        "num_episodes": num_episodes,
        "horizon": horizon,
        "share_of_simulators_time": more / (more + episodes),
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        replace_text(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
