"""Measures the speed of pi0.5's chunks of actions and imitation steps, and compares with the roofline.

One chunk is ten Euler steps from noise, and the critic's value. `sample` is the device's part with the weights alone;
`act` is with LoRA adapters of rank 32 from bytes on the host to actions there, and `act device` the device's part of
that. Weights, images, prompts and noise are random, no image is missing and no prompt is padded. An imitation step is
AdamW on the action expert alone or on all weights, in float32 beside activations of `--dtype`. Compiling and warming up
are not timed. MFU counts the products that the model needs (`stare_jax/plan/pi05_cost.py`), not those that
rematerialisation repeats; the roofline is the larger of the time for these and the time for reading weights, keys and
values. Iterations of PPO are measured by `iteration.py`.

Another implementation is measured beside this one, in turn, if it is given as `--peer=FILE.py:function`; its contract
is `pi05_cases.Peer`. Its actions have to agree with ours before anything is timed.

    python benchmarks/pi05.py --out benchmarks/results/pi05_h100.json                # on a GPU: full size, bfloat16
    python benchmarks/pi05.py --peer=my_openpi.py:make_sampler --cases sample
    python benchmarks/pi05.py --peer=pi05_naive:make_sampler --out benchmarks/results/pi05_cpu.json     # a CPU: reduced
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device import MEASURED, jax_peak, known_peak, measure, reported, summary
from pi05_cases import (
    Peer,
    build,
    load_peer,
    make_config,
    make_inputs,
    make_trained,
    observe,
    our_sampler,
    peer_sampler,
    with_adapters,
)
from stored import draw_observation, make_acting, measure_acting, peak_bytes, random_params, with_stored_prompt

from stare_jax.config import home_path
from stare_jax.models import Pi05Config
from stare_jax.plan.chips import Cost, Peak
from stare_jax.plan.pi05_cost import imitation_flops, sampling_phases
from stare_jax.sharding.mesh import make_mesh
from stare_jax.state.optimizer import frozen_params, make_optimizer
from stare_jax.state.train_state import create_state
from stare_jax.train.sft import SFTBatch, SFTConfig, make_sft_step
from stare_jax.train.update import jit_step
from stare_jax.types import PyTree

OURS = "stare_jax"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference allowed between two implementations' actions, in standard deviations of the actions."""


class DisagreementError(ValueError):
    """A peer whose actions differ from ours."""


def check_agreement(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """Returns the largest difference of actions in their standard deviations.

    Raises:
        DisagreementError: it is above the tolerance, or no number, or the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise DisagreementError(f"actions: got shape {theirs.shape} of the peer, expected {ours.shape}")
    difference = float(np.abs(ours - theirs).max() / ours.std())
    if not difference <= tolerance:
        raise DisagreementError(
            f"actions: got a difference of {difference:.3g} deviations, expected <= {tolerance:.3g}"
        )
    return difference


# ---- Measurements ----------------------------------------------------------------------------------------------------


def measure_sampling(
    config: Pi05Config, params: PyTree, batch: int, peer: Peer | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns a row of ours and, if there is one, of the peer; each is measured `passes` times, in turn."""
    inputs = make_inputs(config, batch, args.seed)
    samplers = {OURS: our_sampler(config, params, inputs)}
    if peer is not None:
        samplers[args.peer] = peer_sampler(peer, config, params, inputs)
    rows, actions = {}, {}
    for name, sample in samplers.items():
        start = time.perf_counter()
        actions[name] = sample()
        rows[name] = {"case": "sample", "batch": batch, "implementation": name, "seconds": []}
        rows[name]["first_s"] = time.perf_counter() - start
    if peer is not None:
        rows[args.peer]["difference"] = check_agreement(actions[OURS], actions[args.peer], args.tolerance)
    for sample in samplers.values():
        sample()
    for _ in range(args.passes):
        for name, sample in samplers.items():
            rows[name]["seconds"] += measure(sample, args.repeats)
    return list(rows.values())


def measure_decisions(config: Pi05Config, params: PyTree, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row of decisions from bytes on the host to actions there, and one of the device's part."""
    inputs, policy = make_inputs(config, batch, args.seed), build(config)
    seen = draw_observation(policy, batch, args.seed)._replace(
        images=dict(zip(config.cameras, inputs.images, strict=True))
    )
    acting = make_acting(with_stored_prompt(policy, inputs.tokens), params, seen, ("",) * batch)
    start = time.perf_counter()
    acting.decide_on_device()
    row = {"batch": batch, "implementation": OURS, "first_s": time.perf_counter() - start}
    acting.decide(), acting.decide_on_device()
    seconds = measure_acting(acting, args.passes * args.repeats)
    row |= {"peak_bytes": peak_bytes()}
    return [row | {"case": name, "seconds": seconds[key]} for name, key in (("act", "act"), ("act device", "device"))]


def measure_imitation(args: argparse.Namespace, config: Pi05Config) -> dict[str, Any]:
    config = make_trained(config, args.trained, args.remat)
    settings = SFTConfig(batch_size=args.train_batch, microbatch_size=args.microbatch)
    policy, tx = build(config), make_optimizer(settings.optimizer, num_steps=1000)
    freeze = frozen_params(policy, settings.optimizer)
    state = create_state(
        random_params(policy, args.seed), tx, mesh=make_mesh(), rules=policy.sharding_rules, freeze=freeze
    )
    step = jit_step(make_sft_step(policy, tx, settings), state)
    inputs = make_inputs(config, args.train_batch, args.seed)
    action = jnp.asarray(np.tanh(inputs.noise[:, :, : config.action_dim]))
    batch = SFTBatch(observe(config, inputs), action, jnp.ones(action.shape[:2], bool))

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        return metrics

    start = time.perf_counter()
    loss = float(run()["sft/loss"])
    row = {"case": f"sft {args.trained}", "batch": args.train_batch, "implementation": OURS}
    row |= {"first_s": time.perf_counter() - start, "loss": loss}
    run()
    return row | {"seconds": measure(run, args.passes * args.repeats)}


def rows_of(args: argparse.Namespace, config: Pi05Config, errors: list[str]) -> Iterator[dict[str, Any]]:
    peer = load_peer(args.peer) if args.peer else None
    if "sample" in args.cases:
        params = random_params(build(config), args.seed)
        for batch in args.batch:
            with reported(errors, f"sample {batch}"):
                yield from measure_sampling(config, params, batch, peer, args)
        del params
    if "act" in args.cases:
        adapted = with_adapters(config)
        params = random_params(build(adapted), args.seed)
        for batch in args.batch:
            with reported(errors, f"act {batch}"):
                yield from measure_decisions(adapted, params, batch, args)
        del params
    if "sft" in args.cases:
        with reported(errors, f"sft {args.train_batch}"):
            yield measure_imitation(args, config)


# ---- What it means ---------------------------------------------------------------------------------------------------


def find_peak(dtype: str, before: Peak | None = None) -> tuple[Peak, str]:
    """Returns what the device can do at most, and who says so; a measured peak is at least the one `before`."""
    device = jax.devices()[0]
    if dtype == "bfloat16" and (peak := known_peak(device.device_kind)):
        return peak, f"{device.device_kind}, as its maker says"
    peak = Peak(**jax_peak(dtype))
    return (peak if before is None else Peak(*map(max, peak, before))), MEASURED


def analyse(rows: Sequence[dict], config: Pi05Config, peak: Peak) -> list[dict[str, Any]]:
    """Adds rates, operations, bytes, MFU, the share of the roofline, and the ratio of the peer's time to ours."""
    lines = []
    for row in rows:
        line, phases = row | summary(row["seconds"]), costs(row, config)
        line |= {"flops": sum(phase.flops for phase in phases), "bytes": sum(phase.bytes for phase in phases)}
        line["rows_per_s"] = row["batch"] / line["median_s"]
        line["mfu"] = line["flops"] / line["median_s"] / peak.flops
        line["roofline"] = sum(phase.least_time(peak) for phase in phases) / line["median_s"]
        lines.append(line)
    for line in lines:
        same = [x["median_s"] for x in lines if (x["case"], x["batch"]) == (line["case"], line["batch"])]
        if line["implementation"] == OURS and len(same) > 1:
            line["ratio"] = same[-1] / line["median_s"]
    return lines


def costs(row: dict, config: Pi05Config) -> list[Cost]:
    if not row["case"].startswith("sft"):  # The products of adapters do not count.
        itemsize = jnp.dtype(config.execution.dtype).itemsize
        return sampling_phases(config, row["batch"], config.num_denoising_steps, itemsize)
    return [Cost(imitation_flops(config, row["batch"], is_prefix_trained=row["case"] == "sft full"), 0.0)]


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    header = (
        f"{'case':<12}{'batch':>6}  {'implementation':<26}{'median':>13}{'fastest':>13}{'slowest':>13}{'rows/s':>10}"
    )
    print(f"\n{header}{'TFLOP':>10}{'GB':>9}{'MFU':>8}{'roofline':>10}{'ratio':>8}")
    for line in lines:
        times = "".join(f"{1e3 * line[key]:>10.1f} ms" for key in ("median_s", "min_s", "max_s"))
        shares = f"{100 * line['mfu']:>6.1f} %{100 * line['roofline']:>8.1f} %"
        ratio = f"{line['ratio']:>8.2f}" if "ratio" in line else ""
        print(
            f"{line['case']:<12}{line['batch']:>6}  {line['implementation']:<26}{times}{line['rows_per_s']:>10.2f}",
            end="",
        )
        print(f"{line['flops'] / 1e12:>10.4g}{line['bytes'] / 1e9:>9.3g}{shares}{ratio}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    has_gpu = jax.devices()[0].platform != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    add = parser.add_argument
    sizes = ("full", "reduced", "tiny")
    add("--size", choices=sizes, default="full" if has_gpu else "reduced", help="(%(default)s here)")
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16" if has_gpu else "float32", help="(%(default)s here)")
    add(
        "--cases",
        type=lambda text: tuple(text.split(",")),
        default=("sample", "act", "sft"),
        help="of sample, act and sft",
    )
    add("--batch", type=numbers, default=(1, 32, 256) if has_gpu else (1, 4), help="rows of one call (%(default)s)")
    add("--steps", type=int, default=10, help="Euler steps of a chunk (%(default)s)")
    add("--cameras", type=int, choices=(1, 2, 3), default=3, help="images of a row (%(default)s)")
    add("--window", type=int, default=50 if has_gpu else 10, help="actions of a chunk (%(default)s here)")
    add("--attention", choices=("xla", "cudnn"), default="xla", help="of images and text (%(default)s)")
    add("--trained", choices=("expert", "full"), default="expert", help="of the imitation step (%(default)s)")
    add("--train-batch", type=int, default=64 if has_gpu else 8, help="rows of an imitation step (%(default)s here)")
    add("--microbatch", type=int, help="rows at once; all without it")
    add("--remat", choices=("none", "full", "dots"), default="full", help="of the imitation step (%(default)s)")
    add("--peer", metavar="FILE.py:FUNCTION", help="another implementation, see pi05_cases.Peer")
    add("--tolerance", type=float, help=f"of its actions, in their deviations ({TOLERANCE})")
    add("--repeats", type=int, default=5, help="of each measurement in a pass (%(default)s)")
    add("--passes", type=int, default=3, help="turns of each implementation (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    add("--out", type=home_path, metavar="PATH", help="also write the result there, as JSON")
    args = parser.parse_args(arguments)
    if args.attention == "cudnn" and args.dtype == "float32":
        parser.error("--attention: got cudnn with float32, which it does not take, expected xla or --dtype=bfloat16")
    args.tolerance = args.tolerance or TOLERANCE[args.dtype]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args, errors = parse(arguments), []
    sizes = {"num_cameras": args.cameras, "window": args.window, "num_denoising_steps": args.steps}
    config = make_config(args.size, args.dtype, attention=args.attention, **sizes)
    before, _ = find_peak(args.dtype)  # and once more after all, as other work on the machine comes and goes
    rows = list(rows_of(args, config, errors))
    peak, source = find_peak(args.dtype, before)
    lines = analyse(rows, config, peak)
    command = "python benchmarks/pi05.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "load_average": os.getloadavg()}
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    result = {"command": command, "machine": machine, "versions": versions, "settings": vars(args)}
    result |= {"peak": {"source": source} | peak._asdict(), "rows": lines, "errors": errors}
    print(f"at most {peak.flops / 1e12:.3g} TFLOP/s and {peak.bandwidth / 1e9:.4g} GB/s: {source}")
    print_table(lines)
    for line in lines:
        if "difference" in line:
            print(f"{line['case']} {line['batch']}: actions differ by {line['difference']:.2g} deviations at most")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n", "utf-8")
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
