"""Measures the speed of OpenVLA's decisions and PPO updates, here and in PyTorch, and compares with the roofline.

Both implementations run in processes of their own, in turn, so that each has the device to itself, with the same sizes,
weights, images and prompts, without padding, and LoRA adapters of rank 32 in all linear layers. PyTorch is timm's and
transformers' modules with SDPA attention, eager and, on a GPU, compiled (CUDA graphs for single tokens); the faster of
the two is compared. Compiling and warming up are not timed. A decision is seven action tokens, greedy: `act` from bytes
on the host to tokens there, `generate` the device's part alone. An update is AdamW on the adapters and on a value head,
with RL4VLA's loss; whole iterations are measured by `iteration.py`. MFU counts the products that the model needs
(`stare_jax/plan/openvla_cost.py`), not those that rematerialisation repeats; the roofline is the larger of the time for
these and the time for reading weights, keys and values.

    python benchmarks/openvla.py --out benchmarks/results/openvla_h100.json                    # on a GPU: 7B, bfloat16
    python benchmarks/openvla.py --batch 32 --cases generate --profile /tmp/trace --only jax
    python benchmarks/openvla.py --size reduced --out benchmarks/results/openvla_cpu.json      # on a CPU: a small model
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device import MEASURED, known_peak, summary
from openvla_cases import LORA, Spec, make_config

from stare_jax.config import home_path
from stare_jax.models import OpenVLAConfig
from stare_jax.plan.chips import Peak
from stare_jax.plan.openvla_cost import generation_phases, update_flops

OURS, EAGER, COMPILED = "stare_jax", "PyTorch", "PyTorch, compiled"
FOLDER = Path(__file__).parent
CUT_OFF = (124, 137)
"""Exit codes of `timeout`."""
# A process sees the CPU alone where the device is the other framework's.
SCRIPTS = {"jax": ("openvla_run_jax.py", {}), "torch": ("openvla_run_torch.py", {"JAX_PLATFORMS": "cpu"})}


def run(framework: str, spec: Spec, cache: str, limit: float) -> dict[str, Any]:
    """Measures one implementation; what goes wrong is a result, too, and its text goes to stderr."""
    script, environment = SCRIPTS[framework]
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # What one pass compiles, the next one finds; PyTorch sees to that by itself.
    environment = environment | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)}
    command = ["timeout", "-k", "5", str(limit), sys.executable, str(FOLDER / script)]
    command += [json.dumps(dataclasses.asdict(spec))]
    print(f"... {framework}", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    result = {"rows": [line for line in lines if "case" in line]}
    if done.returncode:
        how = f"was cut off after {limit:g} s" if done.returncode in CUT_OFF else f"ended with {done.returncode}"
        return result | {"errors": [f"{script} {how}"]}
    return result | lines[-1]


def collect(
    frameworks: list[str], spec: Spec, num_passes: int, limit: float
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Returns what each framework said of itself, and its rows, with the seconds of all passes together."""
    about, rows = {}, {name: [] for name in frameworks}
    with tempfile.TemporaryDirectory() as cache:
        for name in frameworks * num_passes:
            result = run(name, spec, cache, limit)
            found = result.pop("rows")
            before = about.get(name, {})
            if "peak" in result and "peak" in before:
                result["peak"] = {key: max(value, before["peak"][key]) for key, value in result["peak"].items()}
            about[name] = before | result | {"errors": [*before.get("errors", []), *result["errors"]]}
            for new in found:
                same = [row for row in rows[name] if _identity(row) == _identity(new)]
                if same:
                    same[0]["seconds"] += new["seconds"]
                else:
                    rows[name].append(new)
    return about, rows


def _identity(row: dict) -> tuple:
    return row["case"], row["batch"], row.get("compiled", False)


def find_peak(about: dict[str, dict]) -> tuple[Peak | None, str]:
    """Returns what the device can do at most, and who says so."""
    devices = [said["device"] for said in about.values() if "device" in said]
    if devices and (peak := known_peak(devices[0])):
        return peak, f"{devices[0]}, as its maker says"
    measured = [said["peak"] for said in about.values() if "peak" in said]
    if not measured:
        return None, "unknown"
    best = {name: max(peak[name] for peak in measured) for name in measured[0]}
    return Peak(**best), MEASURED


def analyse(rows: dict[str, list[dict]], spec: Spec, peak: Peak | None) -> list[dict[str, Any]]:
    """Adds rates, MFU, the share of the roofline, and the ratio of PyTorch's time to ours."""
    config, lines = make_config(spec), []
    for name, found in rows.items():
        for row in found:
            implementation = OURS if name == "jax" else COMPILED if row["compiled"] else EAGER
            line = {"case": row["case"], "batch": row["batch"], "implementation": implementation}
            line |= summary(row["seconds"]) | _costs(row, config, spec, peak)
            line |= {key: row[key] for key in ("compile_s", "peak_bytes") if key in row}
            lines.append(line)
    for line in lines:
        others = [x for x in lines if (x["case"], x["batch"]) == (line["case"], line["batch"])]
        peers = [x["median_s"] for x in others if x["implementation"] != OURS]
        if line["implementation"] == OURS and peers:
            line["ratio"] = min(peers) / line["median_s"]
    return sorted(lines, key=lambda line: (line["case"], line["batch"], line["implementation"] != OURS))


def _costs(row: dict, config: OpenVLAConfig, spec: Spec, peak: Peak | None) -> dict[str, float]:
    median = summary(row["seconds"])["median_s"]
    is_decision = row["case"] != "update"
    if is_decision:
        itemsize = 2 if spec.dtype == "bfloat16" else 4
        phases = generation_phases(config, row["batch"], spec.prompt_length, itemsize, LORA.rank)
        flops, rate = sum(phase.flops for phase in phases), {"tokens_per_s": row["batch"] * config.action_dim / median}
    else:
        flops, rate = update_flops(config, row["batch"], spec.prompt_length, LORA.rank), {}
    found = {"flops": flops, "decisions_per_s": row["batch"] / median} | rate
    if peak is None:
        return found
    least = sum(phase.least_time(peak) for phase in phases) if is_decision else flops / peak.flops
    return found | {"mfu": flops / median / peak.flops, "roofline": least / median}


def agreement(rows: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Compares what both chose: how many tokens are equal, and the largest difference of log-probabilities."""
    found = []
    for ours in rows.get("jax", []):
        for theirs in rows.get("torch", []):
            if _identity(ours)[:2] != _identity(theirs)[:2] or "logp" not in ours:
                continue
            line = {"case": ours["case"], "batch": ours["batch"], "compiled": theirs["compiled"]}
            if "bins" in ours:
                pairs = [(a, b) for x, y in zip(ours["bins"], theirs["bins"], strict=True) for a, b in zip(x, y)]  # noqa: B905
                line["equal_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
            differences = [abs(a - b) for a, b in zip(ours["logp"], theirs["logp"], strict=True)]
            found.append(line | {"logp_difference": max(differences)})
    return found


def print_table(lines: list[dict[str, Any]]) -> None:
    header = f"{'case':<10}{'batch':>6}  {'implementation':<19}{'median':>12}{'fastest':>12}{'slowest':>12}"
    print(f"\n{header}{'decisions/s':>12}{'tokens/s':>10}{'MFU':>7}{'roofline':>10}{'ratio':>7}")
    for line in lines:
        times = "".join(f"{1e3 * line[key]:>9.1f} ms" for key in ("median_s", "min_s", "max_s"))
        tokens = f"{line['tokens_per_s']:>10.1f}" if "tokens_per_s" in line else f"{'':>10}"
        shares = "".join(
            f"{100 * line[key]:>{width - 2}.1f} %" if key in line else f"{'':>{width}}"
            for key, width in (("mfu", 7), ("roofline", 10))
        )
        ratio = f"{line['ratio']:>7.2f}" if "ratio" in line else ""
        print(f"{line['case']:<10}{line['batch']:>6}  {line['implementation']:<19}{times}", end="")
        print(f"{line['decisions_per_s']:>12.2f}{tokens}{shares}{ratio}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    has_gpu = Path("/dev/nvidia0").exists()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    add = parser.add_argument
    add("--size", choices=("7b", "reduced"), default="7b" if has_gpu else "reduced", help="(%(default)s here)")
    add("--dtype", choices=("bfloat16", "float32"), help="of weights and activations (7b: bfloat16, reduced: float32)")
    add("--only", choices=("jax", "torch"), help="measure this one alone")
    add("--cases", type=lambda text: tuple(text.split(",")), default="generate,update", help="(%(default)s)")
    add("--batch", type=numbers, default="1,32,128", help="images of one generation (%(default)s)")
    add("--prompt-length", type=int, default=30, help="tokens of text (%(default)s)")
    add("--update-batch", type=int, default=64 if has_gpu else 16, help="decisions of an update (%(default)s here)")
    add("--microbatch", type=int, default=16 if has_gpu else 8, help="decisions at once (%(default)s here)")
    add("--remat", choices=("none", "full", "dots"), default="dots", help="of our update (%(default)s)")
    add("--torch-remat", action="store_true", help="PyTorch's update recomputes every layer, too, as ours with full")
    add("--attention", choices=("xla", "cudnn"), help="ours over whole sequences (a GPU, bfloat16: cudnn, else xla)")
    add("--unstack", action=argparse.BooleanOptionalAction, default=has_gpu, help="OpenVLAConfig.unstack_layers")
    add("--compile", action=argparse.BooleanOptionalAction, default=has_gpu, help="measure PyTorch compiled, too")
    add("--repeats", type=int, default=5, help="of each measurement in a pass (%(default)s)")
    add("--limit", type=float, default=3600, metavar="S", help="seconds of one implementation in a pass (%(default)s)")
    add("--passes", type=int, default=2, help="turns of each implementation (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    add("--profile", metavar="DIR", help="also write a JAX trace of one run of each case there")
    add("--out", type=home_path, metavar="PATH", help="also write the result there, as JSON")
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bfloat16" if args.size == "7b" else "float32")
    args.attention = args.attention or ("cudnn" if has_gpu and args.dtype == "bfloat16" else "xla")
    if args.attention == "cudnn" and args.dtype == "float32":
        parser.error("--attention: got cudnn with float32, which it does not take, expected xla or --dtype=bfloat16")
    return args


def main() -> None:
    args = parse()
    spec = Spec(
        size=args.size,
        dtype=args.dtype,
        cases=args.cases,
        batches=args.batch,
        prompt_length=args.prompt_length,
        update_batch=args.update_batch,
        microbatch=args.microbatch,
        remat=args.remat,
        attention=args.attention,
        unstack=args.unstack,
        torch_remat=args.torch_remat,
        torch_compile=args.compile,
        repeats=args.repeats,
        seed=args.seed,
        profile=args.profile,
    )
    about, rows = collect([args.only] if args.only else ["jax", "torch"], spec, args.passes, args.limit)
    peak, source = find_peak(about)
    result: dict[str, Any] = {"command": "python benchmarks/openvla.py " + " ".join(sys.argv[1:])}
    machine = {"cores": os.cpu_count(), "load_average": os.getloadavg(), "python": platform.python_version()}
    result |= {"machine": machine, "implementations": about, "spec": dataclasses.asdict(spec)}
    result["peak"] = {"source": source} | (peak._asdict() if peak else {})
    result |= {"rows": analyse(rows, spec, peak), "agreement": agreement(rows)}
    if peak:
        print(f"at most {peak.flops / 1e12:.3g} TFLOP/s and {peak.bandwidth / 1e9:.4g} GB/s: {source}")
    print_table(result["rows"])
    for line in result["agreement"]:
        tokens = f"{100 * line['equal_tokens']:.1f} % of the tokens are equal, " if "equal_tokens" in line else ""
        print(
            f"{line['case']} {line['batch']}: {tokens}log-probabilities differ by {line['logp_difference']:.2g} at most"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if errors := [error for said in about.values() for error in said["errors"]]:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
