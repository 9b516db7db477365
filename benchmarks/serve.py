"""Measures a served policy: latency and answers a second, of one client and of several, with batches and without.

    python benchmarks/serve.py                                        # the small OpenVLA, random weights
    python benchmarks/serve.py --checkpoint=runs/quickstart/ppo --out=benchmarks/results/serve_cpu.json

Two servers, `launch/serve.py` in processes of their own, answer in turn: one decides for one request at a time
(`--max-batch=1`), the other for all that wait. Clients are threads of this process, each of which asks as soon as it
has its answer. Every case is run in `--passes` rounds, so that both servers meet the same machine; percentiles are over
all rounds. Compiling is over before anything is measured.

The policy without a server is measured in the same rounds, in this process: what a batch takes beside what one request
takes is the most that batches can gain on a machine.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from websockets.sync.client import connect

from stare_jax.config import home_path, to_dict
from stare_jax.envs import EnvConfig
from stare_jax.logging import print_table, replace_text, say
from stare_jax.models import make_policy, openvla_tiny
from stare_jax.runs.config import RunConfig
from stare_jax.runs.load import load_policy
from stare_jax.serve import pack, unpack
from stare_jax.state.checkpoint import Checkpoints
from stare_jax.state.train_state import TrainState
from stare_jax.types import NormStats

ROOT = Path(__file__).resolve().parents[1]
BATCHES = {"one at a time": 1, "batches": 8}
ALONE = "none, the policy alone"


def write_random(folder: Path) -> Path:
    """Writes random weights of the small OpenVLA as a phase of a run, and returns the phase's folder."""
    env = EnvConfig("PushCube-v1", num_workers=1)
    config = RunConfig(env, openvla_tiny(), env.spec.params)
    ones, none = np.ones(env.action_dim, np.float32), np.zeros(0, np.float32)
    stats = NormStats(-ones, ones, ones.astype(bool), none, none)
    params = jax.jit(make_policy(config.model, stats).init)(jax.random.key(0))
    (folder / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    with Checkpoints(folder / "ppo/checkpoints") as checkpoints:
        state = TrainState(jnp.int32(1), params, {}, optax.sgd(0.1).init(params))
        checkpoints.save(1, state, norm_stats=stats, model=to_dict(config.model), counters={})
    return folder / "ppo"


@contextlib.contextmanager
def served(checkpoint: Path, max_batch: int, window_ms: float) -> Iterator[str]:
    """Yields the address of a server."""
    options = [f"--checkpoint={checkpoint}", "--port=0", f"--max-batch={max_batch}", f"--window-ms={window_ms}"]
    command = [sys.executable, ROOT / "launch" / "serve.py", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                if "ws://" in line:
                    yield line.split()[1]
                    return
            raise SystemExit(f"the server of {checkpoint} ended with {process.wait()}")
        finally:
            process.terminate()
            process.communicate()


def make_request(address: str) -> dict[str, Any]:
    """Returns a request as the server's metadata describes it: noise, and a prompt."""
    rng, request = np.random.default_rng(0), {"prompt": "push the cube to the target"}
    with connect(address, compression=None, max_size=None) as connection:
        described = unpack(connection.recv())["request"]
    for key, text in described.items():
        if text.startswith("uint8"):
            request[key] = rng.integers(0, 256, json.loads(text.removeprefix("uint8 ")), dtype=np.uint8)
        elif text.endswith("numbers"):
            keys = key.split(" + ")
            request |= dict.fromkeys(keys, np.zeros(int(text.split()[0]) // len(keys), np.float32))
    return request


def drive(address: str, request: dict[str, Any], num_clients: int, seconds: float) -> tuple[list[float], float]:
    """Returns the latencies in milliseconds of all answers, and answers a second."""
    message, latencies, stop_at = pack(request), [], time.perf_counter() + seconds

    def ask() -> None:
        with connect(address, compression=None, max_size=None) as connection:
            connection.recv()
            while (started := time.perf_counter()) < stop_at:
                connection.send(message)
                unpack(connection.recv())
                latencies.append(1000 * (time.perf_counter() - started))

    started, threads = time.perf_counter(), [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, len(latencies) / (time.perf_counter() - started)


def decider(checkpoint: Path, size: int) -> Callable[[], None]:
    """Returns a compiled call of the policy alone, with a batch of that size."""
    _, policy, params = load_policy(checkpoint)
    observation = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), policy.observation_shape(size))
    sample = jax.jit(policy.sample).lower(params, observation, jax.random.key(0)).compile()
    return lambda: jax.block_until_ready(sample(params, observation, jax.random.key(0))) and None


def decide(call: Callable[[], None], size: int, seconds: float) -> tuple[list[float], float]:
    """Returns latencies in milliseconds and decisions a second, as `drive` does."""
    latencies, stop_at = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < stop_at:
        call()
        latencies.append(1000 * (time.perf_counter() - started))
    return latencies, 1000 * size * len(latencies) / sum(latencies)


def measure(args: argparse.Namespace, checkpoint: Path) -> list[dict[str, Any]]:
    """Returns a row for each server and number of clients, and for the policy alone and each size of a batch."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    alone = {size: decider(checkpoint, size) for size in args.clients}

    def keep(number: int, name: str, clients: int, latencies: list[float], rate: float) -> None:
        row = rows.setdefault((name, clients), {"latencies": [], "rates": []})
        row["latencies"] += latencies
        row["rates"].append(rate)
        say(f"pass {number + 1} of {args.passes}: {name}, {clients}: {rate:.0f} answers/s")

    with contextlib.ExitStack() as stack:
        addresses = {
            name: stack.enter_context(served(checkpoint, size, args.window_ms)) for name, size in BATCHES.items()
        }
        for number in range(args.passes):
            for name, address in addresses.items():
                request = make_request(address)
                for clients in args.clients:
                    keep(number, name, clients, *drive(address, request, clients, args.seconds))
            for size, call in alone.items():
                keep(number, ALONE, size, *decide(call, size, args.seconds))
    return [
        {
            "server": name,
            "clients": clients,
            "answers_s": float(np.median(row["rates"])),
            "num_answers": len(row["latencies"]),
            **{f"p{q}_ms": float(np.percentile(row["latencies"], q)) for q in (50, 90, 99)},
        }
        for (name, clients), row in rows.items()
    ]


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table, with ratios to one client whose requests are answered one at a time, or to one row alone."""
    base = {row["server"] == ALONE: row["answers_s"] for row in reversed(rows)}
    cells = [
        (
            row["server"],
            row["clients"],
            f"{row['answers_s']:.0f}",
            f"{row['answers_s'] / base[row['server'] == ALONE]:.2f}",
            *(f"{row[f'p{q}_ms']:.1f}" for q in (50, 90, 99)),
            f"{row['p99_ms'] / row['p50_ms']:.2f}",
        )
        for row in rows
    ]
    print_table(
        ("server", "clients or batch", "answers/s", "ratio", "median ms", "90 %", "99 %", "99 % / median"), cells
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=home_path, metavar="FOLDER", help="a phase of a run (default: random weights)")
    add("--clients", type=int, nargs="+", default=[1, 8], metavar="N", help="numbers of clients (default: 1 8)")
    add("--seconds", type=float, default=5.0, metavar="S", help="of each case and pass (default: 5)")
    add("--passes", type=int, default=3, metavar="N", help="(default: 3)")
    add("--window-ms", type=float, default=2.0, metavar="MS", help="of the servers (default: 2)")
    add("--out", type=home_path, metavar="FILE", help="also write the rows as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, args.checkpoint or write_random(Path(folder)))
    report(rows)
    if args.out:
        kind = jax.devices()[0].device_kind
        machine = {"machine": platform.machine(), "device": kind, "jax": jax.__version__}
        replace_text(args.out, json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
