"""Trains, evaluates and films a policy: imitation, preference, interaction (IPI).

    python launch/train.py --config=configs/quickstart.py
    python launch/train.py --config=configs/quickstart.py --config.ppo.gamma=0.98 --workdir=runs/gamma98
    python launch/train.py --config=configs/quickstart.py --resume
    python launch/train.py --config=configs/ipi_widowx.py --plan

Ctrl-C or SIGTERM saves and stops; the same command with --resume goes on.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that configs/*.py can import configs.common

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which run: a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; runs/<name of the config> if not given.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on with the run in the run directory, or begin if there is none.")
_PLAN = flags.DEFINE_bool("plan", False, "Print the shapes and sizes of model, optimiser and batches, and stop.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"got arguments {argv[1:]}, expected flags only")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every checkpoint
    from stare_jax.config import ConfigError, from_dict
    from stare_jax.data.schema import DatasetError
    from stare_jax.envs import SimulatorError
    from stare_jax.logging import Interrupted, say
    from stare_jax.runs.config import RunConfig
    from stare_jax.runs.ipi import run_ipi
    from stare_jax.runs.plan import print_plan
    from stare_jax.sharding.mesh import ShardingError
    from stare_jax.state.checkpoint import CheckpointError
    from stare_jax.weights.safetensors_folder import WeightsError

    values = _CONFIG.value.to_dict()
    workdir = Path(_WORKDIR.value or ROOT / "runs" / values.pop("name"))
    values.pop("name", None)
    try:
        config = from_dict(RunConfig, values)
        if _PLAN.value:
            print_plan(config)
            return 0
        say(f"report: {run_ipi(config, workdir, resume=_RESUME.value)}")
    except Interrupted as stopped:
        say(f"{stopped}\ngo on with: {go_on_command()}")
        return 130
    except KeyboardInterrupt:
        print(f"\nstopped at once; what was finished is safe; go on with: {go_on_command()}", file=sys.stderr)
        return 130
    except (
        *(ConfigError, CheckpointError, DatasetError, ShardingError, SimulatorError, WeightsError, FloatingPointError),
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def go_on_command() -> str:
    """Returns the command that goes on with this run."""
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return shlex.join([str(python), *sys.argv, *([] if _RESUME.value else ["--resume"])])


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a field that does not exist, or a value that does not fit, is one line and not a traceback."""
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
