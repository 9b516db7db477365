"""Says what a run will cost on devices that need not be there: memory, operations, exchanges, time; and what fits.

    python launch/plan.py --config=configs/quickstart.py --devices=1x8GB
    python launch/plan.py --config=configs/ipi_maniskill.py:pi05 --devices=8xH100
    python launch/plan.py --config=configs/ipi_maniskill.py --topology=v5e:2x4 --config.mesh.fsdp=8
    python launch/plan.py --config=configs/ipi_maniskill.py --topology=v5p:2x2x1 --programs=sample,ppo
    python launch/plan.py --config=configs/ipi_widowx.py --run-once

Sampling and one optimiser step of every phase are compiled from shapes alone. `--topology` compiles for a slice of
TPUs and needs libtpu, the extra `plan`; `--devices` compiles for a processor that looks like so many devices. A model
of full size takes minutes a program; what was compiled once is kept in runs/plans. Exit code 1: something does not fit.
`--run-once` makes one decision of the model, with random weights, on this machine's processor and compares sampling
with scoring. Exit code 1: they differ by more than rounding.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

import command
from configuration import load_configuration, split_fields

from stare_jax.config import ConfigError, from_dict
from stare_jax.plan.chips import Devices, parse_devices, parse_topology

PROGRAMS = ("sample", "sft", "tpo", "ppo")
_NO_HARDWARE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""environment in which libtpu looks for no TPUs, and two commands may use it at once"""
_LAYER_BY_LAYER = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"
"""XLA's flag without which a processor's compiler moves the widening of layers to float32 out of their loop, so that
all of them are in memory at once"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="the run; --config.section.field=VALUE changes it")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--topology", metavar="KIND:AxB", help="a slice of TPUs: v5e:2x4, v5p:2x2x1, v6e:4x4")
    group.add_argument("--devices", metavar="NxMEMORY", help="8x80GB, or of a kind: 1xA100-80, 8xH100, 1xH200")
    once = "make one decision with random weights on this machine's processor"
    group.add_argument("--run-once", action="store_true", help=once)
    add("--programs", metavar="NAMES", help=f"some of {','.join(PROGRAMS)} (default: those of the run's phases)")
    add("--propose", action="store_true", help="say what fits best, also where the given configuration fits")
    add("--windowed", action="store_true", help="with --topology: let products be cut into windows; takes long")
    tries = "changes that are compiled at most where a program does not fit (default: 3)"
    add("--tries", type=command.natural, default=3, metavar="N", help=tries)
    kept = "where forecasts are kept (default: runs/plans)"
    add("--kept", type=command.path, default=command.ROOT / "runs" / "plans", metavar="DIR", help=kept)
    add("--json", type=command.path, metavar="FILE", help="write what was found of each program to a file, too")
    fields, others = split_fields(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(others, argparse.Namespace(fields=fields))
    if arguments.windowed and not arguments.topology:
        parser.error("--windowed goes with --topology")
    if arguments.run_once and (arguments.programs is not None or arguments.propose or arguments.json):
        parser.error("--programs, --propose and --json go with --topology or --devices")
    return arguments


def choose_devices(arguments: argparse.Namespace) -> Devices:
    """Returns the devices of the command line, and prepares the environment in which JAX is to be imported."""
    devices = parse_topology(arguments.topology) if arguments.topology else parse_devices(arguments.devices)
    os.environ.update(_NO_HARDWARE)
    if devices.number is None:
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                "--topology: libtpu is not installed, which compiles for TPUs; pip install libtpu (700 MB, the extra "
                "'plan'), or take --devices"
            )
        return devices
    add_xla_flags(_LAYER_BY_LAYER, f"--xla_force_host_platform_device_count={devices.number}")
    if version("jaxlib").startswith("0.10."):  # later ones do not know it; fusing takes most of the time
        add_xla_flags("--xla_cpu_use_fusion_emitters=false")
    return devices


def add_xla_flags(*flags: str) -> None:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def plan(arguments: argparse.Namespace) -> int:
    """Prints the plan and returns an exit code."""
    devices = choose_devices(arguments)
    values = load_configuration(arguments.config, arguments.fields)
    # These import JAX, which reads the environment.
    from stare_jax.logging import replace_text, say
    from stare_jax.plan.changes import first_that_fits
    from stare_jax.plan.kept import Kept
    from stare_jax.plan.page import document, excess_line, fits, print_fit, print_forecasts
    from stare_jax.plan.programs import find_devices, programs_of, with_mesh
    from stare_jax.plan.proposals import propose
    from stare_jax.runs.config import RunConfig
    from stare_jax.runs.fit import check_fit
    from stare_jax.runs.start import shorten_planned_prompts

    config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
    check_fit(config, is_here=False)
    config = shorten_planned_prompts(config)
    programs = programs_of(config)
    if arguments.programs is not None:
        chosen = arguments.programs.split(",")
        if unknown := [name for name in chosen if name not in programs]:
            raise ConfigError(f"--programs: got {','.join(unknown)}, expected some of {','.join(programs)}")
        programs = tuple(name for name in programs if name in chosen)
    num_devices = len(find_devices(devices))
    config = with_mesh(config, num_devices)
    kept = Kept(arguments.kept, devices, windowed=arguments.windowed)
    found = [kept(name, config) for name in programs]
    print_forecasts(found, config, devices, num_devices, windowed=arguments.windowed)
    if arguments.json is not None:
        replace_text(arguments.json, json.dumps(document(found, devices), indent=1) + "\n")
    excess = [one for one in found if not fits(one, devices)]
    for one in excess:
        proposal = first_that_fits(config, one, devices.memory, kept, max_compilations=arguments.tries)
        say(excess_line(one, devices.memory, proposal))
    if excess or arguments.propose:
        best = propose(config, found, devices, num_devices, kept, max_compilations=arguments.tries)
        print_fit(best, config, devices, num_devices, windowed=arguments.windowed)
    return command.FAILED if excess else command.DONE


def run_once(arguments: argparse.Namespace) -> int:
    """Makes one decision here, prints what it took and how its scores agree, and returns an exit code."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    add_xla_flags(_LAYER_BY_LAYER)
    values = load_configuration(arguments.config, arguments.fields)
    from stare_jax.plan.once import decide_once
    from stare_jax.plan.page import print_once
    from stare_jax.runs.config import RunConfig
    from stare_jax.runs.start import shorten_planned_prompts

    config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
    found = decide_once(shorten_planned_prompts(config))
    print_once(found)
    return command.DONE if found.agrees else command.FAILED


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.run_once:
        return command.run(lambda: run_once(arguments))
    return command.run(lambda: plan(arguments), after_stop="what was compiled is kept")


if __name__ == "__main__":
    sys.exit(main())
