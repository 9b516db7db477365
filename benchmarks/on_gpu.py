"""Measures both models on one GPU of 80 GB or more, in at most eight minutes; `on_gpu.sh` starts it.

The parts run one after the other, each within a time of its own. A part that fails or is cut off leaves its reason and
what it had measured, and the others run. All goes into one JSON, and one table is printed.

    benchmarks/on_gpu.sh --out=benchmarks/results/on_gpu_h100.json
    benchmarks/on_gpu.sh --peer=my_openpi.py:make_sampler      # beside openpi's own sampler, see pi05_cases.Peer
    benchmarks/on_gpu.sh --reduced                             # small models on the CPU, to try the script: no results
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.config import home_path
from stare_jax.logging import print_table, replace_text

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 470
"""Seconds of all parts together, on a GPU."""
UNLIMITED = 3600.0
"""Seconds of a part that is only tried."""
MODELS = ("openvla", "pi05")
ITERATION = ("iteration_s", "act_s", "env_s", "record_s", "prepare_s", "update_s")
"""An iteration, and its parts as `iteration.py` names them."""
GB = 1e9


class Part(NamedTuple):
    """A benchmark that writes its result as JSON to the file of `--out`."""

    name: str
    limit: float
    """seconds."""
    arguments: Sequence[str]
    """script, relative to the project's folder, and its arguments."""


def find_parts(*, peer: str | None, is_reduced: bool) -> list[Part]:
    """Returns the parts; `peer` is an argument of `pi05.py`."""
    one_pass, peers = ["--passes=1"], [f"--peer={peer}"] if peer else []
    config = "--config=benchmarks/on_gpu_config.py:{}" + (",reduced" if is_reduced else "")
    if is_reduced:
        meshes = ["--meshes=data1,data8,fsdp8", "--repeats=1", "--plan"]
        openvla = ["--size=reduced", "--batch=1", "--update-batch=2", "--microbatch=1", "--repeats=1"]
        pi05 = ["--size=tiny", "--batch=2", "--steps=2", "--cameras=2", "--window=3", "--repeats=2"]
    else:
        meshes = ["--meshes=all", "--plan"]
        openvla = ["--size=7b", "--batch=1,32", "--update-batch=32", "--repeats=3", "--no-compile", "--limit=85"]
        pi05 = ["--size=full", "--batch=1,32", "--repeats=3"]
    iterations = {name: ["benchmarks/iteration.py", config.format(name), *meshes] for name in MODELS}
    return [
        Part("openvla", 175, ["benchmarks/openvla.py", *openvla, *one_pass]),
        Part("openvla iteration", 120, iterations["openvla"]),
        Part("pi05", 70, ["benchmarks/pi05.py", *pi05, *one_pass, "--cases=sample,act", *peers]),
        Part("pi05 iteration", 105, iterations["pi05"]),
    ]


# ---- Running ---------------------------------------------------------------------------------------------------------


def run_part(part: Part, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs one part for at most `limit` seconds; returns its result, if it has written one, and why it ended badly."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, *part.arguments, f"--out={out}"]
        start = time.monotonic()
        with log.open("wb") as file:
            # A session of its own, so that what it starts ends with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(limit)
                reason = None if status == 0 else f"ended with {status}"
            except subprocess.TimeoutExpired:
                reason = f"cut off after {limit:.0f} s"
            finally:
                _end(process)
        seconds, said = time.monotonic() - start, log.read_text("utf-8", "replace").strip().splitlines()
        found: dict[str, Any] = {"arguments": list(part.arguments), "seconds": round(seconds, 1)}
        if reason is not None:
            found |= {"reason": f"{reason}: {said[-1]}" if said else reason, "log": said[-40:]}
        return found | {"result": json.loads(out.read_text("utf-8")) if out.exists() else None}


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(parts: Sequence[Part], environment: dict[str, str], *, total: float, out: Path) -> dict[str, Any]:
    """Runs all parts within `total` seconds and returns what they have left; the file has it after every one."""
    document: dict[str, Any] = {"command": " ".join(["benchmarks/on_gpu.sh", *sys.argv[1:]]), "parts": {}}
    deadline = time.monotonic() + total
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        limit = max(min(part.limit, deadline - time.monotonic()), 0.0)
        print(f"... {part.name}, at most {limit:.0f} s", file=sys.stderr, flush=True)
        document["parts"][part.name] = run_part(part, limit, environment)
        replace_text(out, json.dumps(document, indent=2) + "\n")
    return document


def make_environment(cache: str, *, is_reduced: bool) -> dict[str, str]:
    """Returns the environment of all parts; what one has compiled, the others find in `cache`."""
    found = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    if is_reduced:
        flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        if version("jaxlib").startswith("0.10."):  # later ones do not know it
            flags += " --xla_cpu_use_fusion_emitters=false"
        found |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": flags}
        found |= {"OMP_NUM_THREADS": "1"}  # Threads of PyTorch's that wait for each other would take the processor.
    return found


# ---- Table -----------------------------------------------------------------------------------------------------------

HEADER = ("part", "case", "rows", "by", "time, ms", "rows/s", "MFU", "roofline", "ratio", "peak, GB", "plan, GB")


def table_rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the lines of a part's result."""
    for row in result["rows"]:
        if "mesh" in row:
            yield from _iteration_rows(name, row)
            continue
        rate = row.get("decisions_per_s", row.get("rows_per_s"))
        shares = [_number(row.get(key), 100, " %") for key in ("mfu", "roofline")]
        place = (name, row["case"], str(row["batch"]), row["implementation"])
        peak = _number(row.get("peak_bytes"), 1 / GB)
        yield (*place, _number(row["median_s"], 1e3), _number(rate), *shares, _number(row.get("ratio")), peak, "")


def _iteration_rows(name: str, row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields decisions, and an iteration with its parts, on one mesh."""
    mesh = "x".join(f"{axis}{size}" for axis, size in row["mesh"].items() if size > 1) or "data1"
    peaks, plan = row["peak_bytes"], row.get("plan_bytes", {})
    for case in ("act", "device"):
        seconds = row[case]["median_s"]
        memory = [_number(x.get("rollout"), 1 / GB) if case == "act" else "" for x in (peaks, plan)]
        place = (name, case, str(row["rows"]), mesh, _number(seconds, 1e3), _number(row["rows"] / seconds))
        yield (*place, "", "", "", *memory)
    for case in ITERATION:
        is_whole = case == "iteration_s"
        memory = [_number(x.get("update"), 1 / GB) if is_whole else "" for x in (peaks, plan)]
        rate = _number(row["decisions_per_s"]) if is_whole else ""
        what = case.removesuffix("_s") if is_whole else f"- {case.removesuffix('_s')}"
        yield (name, what, str(row["num_decisions"]), mesh, _number(row[case], 1e3), rate, "", "", "", *memory)


def _number(value: float | None, factor: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{factor * value:.4g}{unit}"


def print_all(document: dict[str, Any]) -> None:
    """Prints the table of all parts, the first log-ratios, and the reasons of those that ended badly."""
    results = {name: part["result"] for name, part in document["parts"].items() if part["result"]}
    print_table(HEADER, [row for name, result in results.items() for row in table_rows(name, result)])
    for name, result in results.items():
        for row in result["rows"]:
            if "first_log_ratio_rms" in row:
                print(f"{name}: log-ratios of the first minibatch, root mean square {row['first_log_ratio_rms']:.2g}")
    for name, part in document["parts"].items():
        if "reason" in part:
            print(f"{name}: {part['reason']}")


# ---- Command ---------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--reduced", action="store_true", help="small models on the CPU as eight devices, without limits of time")
    add("--peer", metavar="FILE.py:FUNCTION", help="another implementation of pi0.5, see pi05_cases.Peer")
    add("--out", type=home_path, default=Path("runs/on_gpu.json"), metavar="PATH", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not args.reduced and not Path("/dev/nvidia0").exists():
        sys.exit("benchmarks/on_gpu.sh: there is no GPU here; --reduced tries the script on the CPU")
    peer, (file, _, function) = args.peer, (args.peer or "").rpartition(":")
    if file.endswith(".py"):  # The parts run in another folder.
        peer = f"{home_path(file).absolute()}:{function}"
    parts = find_parts(peer=peer, is_reduced=args.reduced)
    if args.reduced:
        parts = [part._replace(limit=UNLIMITED) for part in parts]
    with tempfile.TemporaryDirectory() as cache:
        environment = make_environment(cache, is_reduced=args.reduced)
        total = UNLIMITED if args.reduced else TOTAL
        document = run_all(parts, environment, total=total, out=args.out)
    print_all(document)
    print(f"written: {args.out}")
    sys.exit(any("reason" in part for part in document["parts"].values()))


if __name__ == "__main__":
    main()
