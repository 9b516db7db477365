"""Converts weights of OpenVLA and of pi0.5 to a checkpoint that a run can start from, and back.

    python launch/convert.py --from=/data/openvla-7b --unnorm-key=bridge_orig --to=runs/openvla-7b
    python launch/convert.py --from=/data/openvla-7b --adapter=/data/lora --to=runs/warm
    python launch/convert.py --from=runs/ipi/ppo --to=/data/trained              # adapters alone, if there are any
    python launch/convert.py --from=runs/ipi/ppo --merge --to=/data/trained      # the whole model
    python launch/convert.py --from=/data/pi05_base --unnorm-key=droid --to=runs/pi05     # openpi's, lerobot's, an npz
    python launch/convert.py --from=runs/pi05_ppo/ppo --to-format=safetensors --to=/data/trained

The direction follows from what --from holds. A folder that was converted keeps all that its checkpoint had besides the
weights that are trained, and gives it back; a phase of a run follows `init_from` to where it came from, or --base says.
Pickles are never read. What is written is there when it is complete, or not at all.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command

from stare_jax.config import ConfigError
from stare_jax.logging import PeakMemory, say
from stare_jax.models import LoRAConfig
from stare_jax.weights.folders import OPENVLA, PI05, find_kind
from stare_jax.weights.import_openvla import Imported, import_openvla
from stare_jax.weights.import_pi05 import ImportedPi05, import_pi05
from stare_jax.weights.openvla.side_files import KEPT

OPTIONS = {
    "an OpenVLA checkpoint": ("adapter", "unnorm_key", "fsdp", "tensor", "seed"),
    "our own checkpoint of OpenVLA": ("base", "step", "merge", "stats_name", "max_shard_gb"),
    "a checkpoint of pi0.5": ("unnorm_key", "action_dim", "state_dim", "fsdp", "tensor", "seed"),
    "our own checkpoint of pi0.5": ("to_format", "step", "merge", "stats_name", "max_shard_gb"),
}
"""what goes with each direction, by what --from holds."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="FOLDER", help="what to convert")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as it is, nothing is rounded)")
    add = parser.add_argument_group("from a checkpoint of others").add_argument
    add("--adapter", type=Path, metavar="FOLDER", help="OpenVLA: a PEFT adapter of it, to be trained further")
    add(
        "--unnorm-key",
        metavar="NAME",
        help="data set, or asset, whose statistics the policy has (default: the only one)",
    )
    add("--action-dim", type=int, metavar="N", help="pi0.5: numbers of the robot's actions (default: the statistics')")
    add("--state-dim", type=int, metavar="N", help="pi0.5: numbers of the robot's state (default: the statistics')")
    add("--fsdp", type=int, metavar="N", help="devices over which weights are cut meanwhile (default: 1)")
    add("--tensor", type=int, metavar="N", help="devices over which single matrices are cut (default: 1)")
    add("--seed", type=int, help="of what the checkpoint does not have (default: 0)")
    add = parser.add_argument_group("to a checkpoint of others").add_argument
    add("--base", type=Path, metavar="FOLDER", help="OpenVLA: what the run began as (default: follows init_from)")
    add("--to-format", metavar="NAME", help="pi0.5: openpi, safetensors or lerobot (default: as it was, else openpi)")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    add(
        "--merge",
        action="store_const",
        const=True,
        help="put adapters into the weights; else OpenVLA's are written alone",
    )
    add("--stats-name", metavar="NAME", help="of the run's statistics among the data sets' (default: its environment)")
    add("--max-shard-gb", type=float, metavar="GB", help="of one file (default: 5, and one file for pi0.5)")
    return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace, what: str) -> dict[str, Any]:
    """Returns the options that are given, given what there is to convert.

    Raises:
        ConfigError: some of them do not go with it.
    """
    every = dict.fromkeys(name for names in OPTIONS.values() for name in names)
    given = {name: getattr(arguments, name) for name in every if getattr(arguments, name) is not None}
    if wrong := given.keys() - set(OPTIONS[what]):
        flags, allowed = (", ".join(map(flag, names)) for names in (sorted(wrong), OPTIONS[what]))
        raise ConfigError(f"{flags}: got {what} in {arguments.source}, expected no others than {allowed}")
    return given


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def convert(arguments: argparse.Namespace) -> None:
    """Converts in whichever direction the source asks for."""
    source, to, dtype = arguments.source, arguments.to, arguments.dtype
    kind = find_kind(source)
    if kind == OPENVLA:
        report_openvla(import_openvla(source, to, dtype=dtype, **options_of(arguments, "an OpenVLA checkpoint")), to)
    elif kind == PI05:
        report_pi05(import_pi05(source, to, dtype=dtype, **options_of(arguments, "a checkpoint of pi0.5")), to)
    else:
        export(arguments)


def export(arguments: argparse.Namespace) -> None:
    """Converts a checkpoint of ours."""
    # Know runs, and so all that they are made of.
    from stare_jax.weights.export_openvla import export_openvla
    from stare_jax.weights.export_pi05 import export_pi05, is_pi05_checkpoint

    source, to, is_pi05 = arguments.source, arguments.to, is_pi05_checkpoint(arguments.source)
    options = options_of(arguments, f"our own checkpoint of {'pi0.5' if is_pi05 else 'OpenVLA'}")
    if (max_gb := options.pop("max_shard_gb", None)) is not None:
        if not max_gb > 0:
            raise ConfigError(f"max_shard_gb: got {max_gb}, expected > 0")
        options["max_bytes"] = int(max_gb * 1e9)
    if is_pi05:
        form = export_pi05(source, to, form=options.pop("to_format", None), dtype=arguments.dtype, **options)
        kind = f"a model for {form}"
    else:
        kind = {"adapter": "an adapter", "model": "a model"}[
            export_openvla(source, to, dtype=arguments.dtype, **options)
        ]
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    say(f"written: {to}, {kind} of {size / 1e9:.2f} GB")


def report_openvla(imported: Imported, to: Path) -> None:
    """Says what was converted and how to train from it."""
    config, lora = imported.config, imported.config.lora
    say(f"{imported.num_params:,} parameters of {config.execution.param_dtype}, {imported.num_bytes / 1e9:.2f} GB")
    say(f"kept aside: {imported.num_unused} tensors that are never run, and all JSON files")
    if imported.left:
        say(f"not taken along: {', '.join(imported.left)}")
    flags = [f"--config.init_from={to}", f"--config.model.tokenizer={to / KEPT}"]
    if lora is not None:
        flags += [f"--config.model.lora.rank={lora.rank}", f"--config.model.lora.alpha={lora.alpha}"]
        flags += [f"--config.model.lora.targets={lora.targets!r}"] if lora.targets != LoRAConfig().targets else []
    say(f"written: {to}; train with {shlex.join(flags)}")


def report_pi05(imported: ImportedPi05, to: Path) -> None:
    """Says what was converted and how to train from it."""
    config = imported.config
    say(f"{imported.num_params:,} parameters of {config.execution.param_dtype}, {imported.num_bytes / 1e9:.2f} GB")
    say(f"from {imported.form}; {imported.num_fresh:,} of them are not there and begin with random values")
    stats = f"statistics of {imported.asset_id}" if imported.asset_id else "no statistics: nothing is scaled"
    say(f"{stats}; actions of {config.action_dim} numbers, states of {config.state_dim}")
    if imported.left:
        say(f"not taken along: {', '.join(imported.left)}")
    flags = [f"--config.init_from={to}"]
    if config.lora is not None:
        flags += [f"--config.model.lora.rank={config.lora.rank}", f"--config.model.lora.alpha={config.lora.alpha}"]
        flags += [f"--config.model.lora.targets={config.lora.targets!r}"]
    say(f"written: {to}; train with {shlex.join(flags)}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def work() -> None:
        with PeakMemory() as memory:
            convert(arguments)
        if memory.peak is not None:
            say(f"memory: {memory.peak / 1e9:.2f} GB at most, {memory.start / 1e9:.2f} GB of it before the conversion")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
