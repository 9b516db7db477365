"""Measures the time to annotate trajectories with labels, costs, potentials, shaped rewards and advantages.

Three implementations of the pick-place family annotate the same trajectories: ours (`jit(vmap)`), a NumPy loop over the
trajectories, and one in torch that is vectorised over them. Their results are compared first; then they run in turn, so
that other work on the machine affects all of them. Inputs lie on the device before the clock starts.

    python benchmarks/stages.py --json benchmarks/results/stages_cpu.json
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from stages_reference import annotate_numpy, annotate_torch

from stare_jax import losses, stages
from stare_jax.config import home_path
from stare_jax.types import Signals

TASK = stages.get_task("StackCube-v1")
# The other two implementations are of the paper's own potentials, and of shaping that ends at zero.
SPEC = dataclasses.replace(TASK, params=dataclasses.replace(TASK.params, progressive=False))
TERMINAL_POTENTIAL = "zero"
GAMMA, GAE_LAMBDA = 0.99, 0.95
QUANTITIES = ("label", "cost", "potential", "shaped reward", "advantage")
TOLERANCE = 1e-4
OURS, NUMPY, TORCH = "stare_jax, jit(vmap)", "NumPy, loop over trajectories", "torch, vectorised"


def make_trajectories(num: int, num_states: int, seed: int = 0) -> tuple[Signals, np.ndarray, np.ndarray]:
    """Signals, valid and value `[num, num_states, ...]`: reach, grasp, lift, carry, place; some drop the object."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform([0.1, 0.05, 0.1, 0.15, 0.05], [0.25, 0.1, 0.2, 0.3, 0.15], (num, 5)) * (num_states - 1)
    near, closed, up, over, placed = np.cumsum(lengths, axis=1).T[:, :, None]
    t = np.arange(num_states)[None]

    def progress(start, end):
        return np.clip((t - start) / (end - start), 0.0, 1.0)[..., None]

    def position(z):
        return np.append(rng.uniform(-0.1, 0.1, (num, 1, 2)), np.full((num, 1, 1), z), axis=-1)

    def orientation():
        quat = [1, 0, 0, 0] + rng.normal(0, 0.5, (num, 1, 4)) + rng.normal(0, 0.01, (num, num_states, 4))
        return quat / np.linalg.norm(quat, axis=-1, keepdims=True)

    start, goal = position(0.02), position(0.06)
    obj = start + progress(up, over) * (goal - start) * [1, 1, 0]
    obj[..., 2:] += 0.1 * progress(closed, up) - 0.06 * progress(over, placed)
    dropped = (t > rng.uniform(closed, over)) & (rng.random((num, 1)) < 0.3)
    obj = np.where(dropped[..., None], obj * [1, 1, 0] + [0, 0, 0.02], obj) + rng.normal(0, 1e-3, obj.shape)
    tcp_start, obj_quat = position(0.2), orientation()
    success = (t >= placed) & ~dropped
    signals = Signals(
        tcp_pos=tcp_start + progress(0, near) * (obj - tcp_start) + rng.normal(0, 1e-3, obj.shape),
        tcp_quat=orientation(),
        obj_pos=obj,
        obj_quat=obj_quat,
        grasp_pos=obj,
        goal_pos=np.broadcast_to(goal, obj.shape),
        goal_quat=np.broadcast_to(obj_quat[:, :1], obj_quat.shape),
        is_grasped=(t > closed) & (t < placed) & ~dropped,
        is_contact=(t > near) & ~dropped,
        success=success,
        support_z=np.full((num, num_states), 0.02),
    )
    dtypes = [bool if leaf.dtype == bool else np.float32 for leaf in signals]
    signals = Signals(*(np.ascontiguousarray(leaf, dtype) for leaf, dtype in zip(signals, dtypes, strict=True)))
    valid = np.cumsum(np.cumsum(success, axis=1), axis=1) <= 1  # Up to the first success.
    return signals, valid, rng.normal(0.5, 0.2, (num, num_states)).astype(np.float32)


def annotate(signals: Signals, valid: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """Label `[T]`, cost `[K]`, potential `[T]`, shaped reward and advantage `[N]` of one trajectory; 0 on padding."""
    separation = stages.separate(SPEC, signals, valid)
    cost = stages.stage_costs(SPEC, signals, separation, valid)
    potential = stages.potentials(SPEC, signals, separation)
    reward = stages.success_rewards(signals.success, valid)
    discount = GAMMA * (1.0 - reward)
    shaped = stages.shape_rewards(
        reward, potential[:-1], potential[1:], discount, gamma=GAMMA, terminal_potential=TERMINAL_POTENTIAL
    )
    is_action = valid[1:]
    is_last = is_action & ~jnp.append(is_action[1:], False)
    advantage, _ = losses.gae(shaped, discount, value[:-1], value[1:], gae_lambda=GAE_LAMBDA, truncated_t=is_last)
    label, potential = jnp.where(valid, separation.stage_t, 0), jnp.where(valid, potential, 0.0)
    return label, cost, potential, jnp.where(is_action, shaped, 0.0), jnp.where(is_action, advantage, 0.0)


def make_candidates(signals: Signals, valid: np.ndarray, value: np.ndarray) -> dict[str, Callable]:
    """name -> a function without arguments that annotates all trajectories and waits for the result."""
    compiled = jax.jit(jax.vmap(annotate))
    arrays = jax.device_put((signals, valid, value))
    device = torch_device()
    *tensors, torch_valid, torch_value = (torch.from_numpy(array).to(device) for array in (*signals, valid, value))

    def run_numpy():
        rows = (
            annotate_numpy(SPEC.params, Signals(*(leaf[i] for leaf in signals)), valid[i], value[i], GAMMA, GAE_LAMBDA)
            for i in range(len(valid))
        )
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def run_torch():
        result = annotate_torch(SPEC.params, Signals(*tensors), torch_valid, torch_value, GAMMA, GAE_LAMBDA)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return {OURS: lambda: jax.block_until_ready(compiled(*arrays)), NUMPY: run_numpy, TORCH: run_torch}


def check_agreement(results: dict[str, tuple]) -> dict[str, float]:
    """Returns each quantity's largest difference between two implementations; exits where it is not just rounding."""
    results = {
        name: [x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in result]
        for name, result in results.items()
    }
    differences = {}
    for i, quantity in enumerate(QUANTITIES):
        values = np.stack([result[i].astype(np.float64) for result in results.values()])
        differences[quantity] = float(np.max(np.ptp(values, axis=0)))
        if not differences[quantity] <= TOLERANCE:
            raise SystemExit(f"{quantity} differs by {differences[quantity]:.3g}, expected at most {TOLERANCE:g}.")
    return differences


def measure(candidates: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Returns seconds per run of each candidate; they take turns."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def torch_device() -> str:
    """The accelerator if JAX uses one too."""
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def describe_machine() -> dict:
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "jax_devices": sorted({device.device_kind for device in jax.devices()}),
        "torch_device": torch.cuda.get_device_name() if torch_device() == "cuda" else "cpu",
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _read(path: str) -> str:
    return Path(path).read_text("utf-8") if Path(path).exists() else ""


def report(args: argparse.Namespace, seconds: dict[str, list[float]], differences: dict[str, float]) -> dict:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "implementation": name,
            "median_s": medians[name],
            "min_s": min(values),
            "max_s": max(values),
            "states_per_s": args.trajectories * args.states / medians[name],
            "ratio_to_ours": medians[name] / medians[OURS],
        }
        for name, values in seconds.items()
    ]
    sizes = {name: getattr(args, name) for name in ("trajectories", "states", "rounds", "seed")}
    options = " ".join(f"--{name} {value}" for name, value in sizes.items())
    command = f"python benchmarks/stages.py {options}"
    return {
        "command": command,
        **sizes,
        "machine": describe_machine(),
        "largest_difference": differences,
        "rows": rows,
    }


def print_table(result: dict) -> None:
    print(f"{result['trajectories']} trajectories of {result['states']} states, median of {result['rounds']} rounds")
    print(f"{'implementation':<32}{'median':>12}{'fastest':>12}{'slowest':>12}{'states/s':>12}{'ratio':>9}")
    for row in result["rows"]:
        times = "".join(f"{1e3 * row[key]:>9.1f} ms" for key in ("median_s", "min_s", "max_s"))
        print(f"{row['implementation']:<32}{times}{row['states_per_s']:>12.3g}{row['ratio_to_ours']:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=4096, help="number of trajectories (%(default)s)")
    parser.add_argument("--states", type=int, default=61, help="states of each trajectory (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each implementation (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trajectories (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    parser.add_argument("--devices", action="store_true", help="say what would be measured on, and stop")
    args = parser.parse_args()
    print("\n".join(f"{name}: {value}" for name, value in describe_machine().items()), end="\n\n")
    if args.devices:
        return
    candidates = make_candidates(*make_trajectories(args.trajectories, args.states, args.seed))
    differences = check_agreement({name: run() for name, run in candidates.items()})
    result = report(args, measure(candidates, args.rounds), differences)
    print_table(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
