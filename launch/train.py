"""Trains, evaluates and films a policy: imitation, preference, interaction (IPI).

    python launch/train.py --config=configs/quickstart.py
    python launch/train.py --config=configs/quickstart.py --config.ppo.gamma=0.98 --workdir=runs/gamma98
    python launch/train.py --config=configs/quickstart.py --config.phases=sft,ppo --workdir=runs/without_tpo
    python launch/train.py --config=configs/quickstart.py --redo=tpo
    python launch/train.py --config=configs/ipi_widowx.py --plan

Ctrl-C or SIGTERM saves and stops; the same command goes on. A run goes on with its own configuration only: what differs
is named and refused, but for phases that have not begun and a larger number of steps.
"""

import sys
from pathlib import Path

import command
from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which run: a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; runs/<name of the config> if not given.")
_REDO = flags.DEFINE_string("redo", "", "Do this phase and what follows it again; what is there moves to set_aside/.")
_PROFILE = flags.DEFINE_integer("profile", 0, "Trace this many optimiser steps of every phase, after its first.")
_PLAN = flags.DEFINE_bool("plan", False, "Print the shapes and sizes of model, optimiser and batches, and stop.")
flags.DEFINE_bool("resume", True, "Does nothing: a run in the run directory is gone on with in any case.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"got arguments {argv[1:]}, expected flags only")
    return command.run(train, go_on=go_on_command())


def train() -> None:
    """Runs the phases of the configuration, or prints their plan."""
    from stare_jax.config import from_dict
    from stare_jax.logging import say
    from stare_jax.runs.config import RunConfig
    from stare_jax.runs.ipi import run_ipi
    from stare_jax.runs.plan import print_plan

    values = _CONFIG.value.to_dict()
    workdir = Path(_WORKDIR.value or command.ROOT / "runs" / values.pop("name"))
    values.pop("name", None)
    config = from_dict(RunConfig, values)
    if _PLAN.value:
        print_plan(config)
        return
    say(f"report: {run_ipi(config, workdir, redo=_REDO.value, profile=_PROFILE.value)}")


def go_on_command() -> str:
    """Returns the command that goes on with this run: `--redo` has done its work, or nothing yet."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument in ("--redo", "-redo"):
            next(arguments, None)
        elif not argument.lstrip("-").startswith("redo="):
            kept.append(argument)
    return command.repeat_command(kept)


def print_help() -> None:
    """Prints the examples, the flags, and every field of a configuration that takes one of a few words."""
    from stare_jax.config import list_choices
    from stare_jax.runs.config import RunConfig

    print(__doc__)
    print(flags.FLAGS.main_module_help())
    print("\nEvery field of the configuration is a flag, --config.section.field=VALUE. Some take one of a few words:")
    for path, allowed in list_choices(RunConfig).items():
        print(f"  --{path}: {', '.join(map(str, allowed))}")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a field that does not exist, or a value that does not fit, is one line and not a traceback."""
    if {"--help", "-h", "-help", "--helpfull"} & set(argv):
        print_help()
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.name  # a file that is not there is found out here
        return rest
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # ml_collections wraps one error into another, and puts the traceback of a file that fails into the message.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        if isinstance(error, KeyError):
            reason = f"no field {' '.join(str(error.args[0]).split())}"
        else:
            reason = [line.strip() for line in str(error).splitlines() if line.strip() and "--help" not in line][-1]
        print(f"error: {reason} (python launch/train.py --help)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
