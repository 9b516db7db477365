"""How long does it take to annotate trajectories: labels, costs, potentials, shaped rewards and advantages?

Three implementations of the pick-place family on the same trajectories: ours (`jit(vmap)`), a NumPy loop over the
trajectories, and one in torch that is vectorised over them. They are compared with each other first; then they take
turns, so that whatever else the machine does meets all of them. Inputs lie on the device before the clock starts.

    python benchmarks/stages.py --json benchmarks/results/stages_cpu.json
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from stages_reference import annotate_numpy, annotate_torch

from stare_jax import losses, stages
from stare_jax.types import Signals

SPEC = stages.get_task("StackCube-v1")
GAMMA, GAE_LAMBDA = 0.99, 0.95
QUANTITIES = ("label", "cost", "potential", "shaped reward", "advantage")
TOLERANCE = 1e-4


def make_trajectories(num: int, num_states: int, seed: int = 0) -> tuple[Signals, np.ndarray, np.ndarray]:
    """Signals, valid and value `[num, num_states, ...]`: reach, grasp, lift, carry, place; some drop the object."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform([0.1, 0.05, 0.1, 0.15, 0.05], [0.25, 0.1, 0.2, 0.3, 0.15], (num, 5)) * (num_states - 1)
    near, closed, up, over, placed = np.cumsum(lengths, axis=1).T[:, :, None]
    t = np.arange(num_states)[None]

    def progress(start, end):
        return np.clip((t - start) / (end - start), 0.0, 1.0)[..., None]

    start, goal, tcp_start = rng.uniform(-0.1, 0.1, (3, num, 1, 3)) * [1, 1, 0] + [[[[0.02 * z]]] for z in (1, 3, 10)] * [0, 0, 1]
