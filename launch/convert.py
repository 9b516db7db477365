"""Converts weights: an OpenVLA checkpoint in Hugging Face's format to one that a run can start from, and back.

    python launch/convert.py --from=/data/openvla-7b --unnorm-key=bridge_orig --to=runs/openvla-7b
    python launch/convert.py --from=/data/openvla-7b --adapter=/data/lora --to=runs/warm
    python launch/convert.py --from=runs/ipi/ppo --to=/data/trained              # adapters alone, if there are any
    python launch/convert.py --from=runs/ipi/ppo --merge --to=/data/trained      # the whole model

The direction follows from what --from holds. A folder that was converted keeps all that its checkpoint had besides the
weights that are trained, and gives it back; a phase of a run follows `init_from` to where it came from, or --base says.
Only safetensors and JSON are read. What is written is there when it is complete, or not at all.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import logging

from stare_jax.convert.safetensors_folder import WeightsError
from stare_jax.logging import PeakMemory, say
from stare_jax.train.checkpoint import CheckpointError
from stare_jax.train.config import ConfigError
from stare_jax.train.import_weights import Imported, import_openvla
from stare_jax.train.sharding import ShardingError
from stare_jax.train.weight_folders import is_huggingface

IN, OUT = "only for reading an OpenVLA checkpoint", "only for writing one"
DIRECTION = {
    **dict.fromkeys(("adapter", "unnorm_key", "fsdp", "tensor", "seed"), IN),
    **dict.fromkeys(("base", "step", "merge", "stats_name", "max_shard_gb"), OUT),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="FOLDER", help="what to convert")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as it is, nothing is rounded)")
    add = parser.add_argument_group("from an OpenVLA checkpoint").add_argument
    add("--adapter", type=Path, metavar="FOLDER", help="a PEFT adapter of it, to be trained further")
    add("--unnorm-key", metavar="NAME", help="data set whose statistics the policy has (default: the only one)")
    add("--fsdp", type=int, metavar="N", help="devices over which weights are cut meanwhile (default: 1)")
    add("--tensor", type=int, metavar="N", help="devices over which single matrices are cut (default: 1)")
    add("--seed", type=int, help="of a value head, where the checkpoint has none (default: 0)")
    add = parser.add_argument_group("to an OpenVLA checkpoint or an adapter").add_argument
    add("--base", type=Path, metavar="FOLDER", help="checkpoint that the run began as (default: follows init_from)")
    add("--step", type=int, help="which checkpoint (default: the latest)")
    add("--merge", action="store_const", const=True, help="put adapters into the weights; else they are written alone")
    add("--stats-name", metavar="NAME", help="of the run's statistics among the data sets' (default: its environment)")
    add("--max-shard-gb", type=float, metavar="GB", help="of one file (default: 5)")
    return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace, direction: str) -> dict[str, Any]:
    """Returns the options of one direction that are given.

    Raises:
        ConfigError: options of the other direction are given.
    """
    given = {name: getattr(arguments, name) for name in DIRECTION if getattr(arguments, name) is not None}
    if wrong := [name for name in given if DIRECTION[name] != direction]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        kind = "an OpenVLA checkpoint" if direction == IN else "our own checkpoint"
        raise ConfigError(f"{flags}: got {kind} in {arguments.source}, expected none: {DIRECTION[wrong[0]]}")
    return given


def convert(arguments: argparse.Namespace) -> None:
    """Converts in whichever direction the source asks for."""
    source, to = arguments.source, arguments.to
    if is_huggingface(source):
        report_import(import_openvla(source, to, dtype=arguments.dtype, **options_of(arguments, IN)), to)
        return
    options = options_of(arguments, OUT)
    max_gb = options.pop("max_shard_gb", 5.0)
    if not max_gb > 0:
        raise ConfigError(f"max_shard_gb: got {max_gb}, expected > 0")
    from stare_jax.train.export_weights import export_openvla  # knows runs, and so all that they are made of

    kind = export_openvla(source, to, dtype=arguments.dtype, max_bytes=int(max_gb * 1e9), **options)
    size = sum(path.stat().st_size for path in to.iterdir())
    say(f"written: {to}, {'an adapter' if kind == 'adapter' else 'a model'} of {size / 1e9:.2f} GB")


def report_import(imported: Imported, to: Path) -> None:
    """Says what was converted and how to train from it."""
    config, lora = imported.config, imported.config.lora
    say(f"{imported.num_params:,} parameters of {config.execution.param_dtype}, {imported.num_bytes / 1e9:.2f} GB")
    say(f"kept aside: {imported.num_unused} tensors that are never run, and all JSON files")
    if imported.left:
        say(f"not taken along: {', '.join(imported.left)}")
    flags = [f"--config.init_from={to}", f"--config.model.tokenizer={to / 'huggingface'}"]
    if lora is not None:
        flags += [f"--config.model.lora.rank={lora.rank}", f"--config.model.lora.alpha={lora.alpha}"]
        flags += [f"--config.model.lora.targets={lora.targets!r}"]
    say(f"written: {to}; train with {' '.join(flags)}")


def stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with PeakMemory() as memory:
            convert(arguments)
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    except (ConfigError, CheckpointError, ShardingError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    if memory.peak is not None:
        say(f"memory: {memory.peak / 1e9:.2f} GB at most, {memory.start / 1e9:.2f} GB of it before the conversion")
    return 0


if __name__ == "__main__":
    sys.exit(main())
