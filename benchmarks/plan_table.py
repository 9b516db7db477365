"""Costs of the recipes at full size on devices that need not be there: sampling and PPO, row by row, into one file.

    python benchmarks/plan_table.py                    # compiles what is missing; rows of TPUs need libtpu
    python benchmarks/plan_table.py --rows=one_gpu     # rows with this text in their model, devices or recipe
    python benchmarks/plan_table.py --show             # prints the tables of docs/plan.md and compiles nothing

A row is a recipe on some devices, and each of its programs is one call of `launch/plan.py`. A program is in the file as
soon as it is known, and is not compiled again, so that the command can be stopped at any time. Where weights, optimiser
state and gradients alone are more than the memory, nothing is compiled. Programs for TPUs are compiled without windowed
products, and one takes 5 to 20 minutes of a core; one for GPUs takes a minute or two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from stare_jax.config import from_dict, home_path
from stare_jax.logging import replace_text, say
from stare_jax.models import Pi05Config
from stare_jax.plan.changes import held_bytes
from stare_jax.plan.chips import GB, Devices, parse_devices, parse_topology
from stare_jax.plan.openvla_cost import generation_phases
from stare_jax.plan.pi05_cost import sampling_phases
from stare_jax.plan.programs import num_microbatches, with_mesh
from stare_jax.runs.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "plan_table.json"
RECIPE = "configs/ipi_widowx.py"
Table = dict[str, dict[str, dict[str, Any]]]
"""row -> program -> what is known of it"""


class Row(NamedTuple):
    """A recipe, and the devices that it is compiled for."""

    model: str
    devices: str
    """as on the command line of `launch/plan.py`."""
    number: int
    """devices."""
    words: str = ""
    """words of the recipe."""
    fields: tuple[str, ...] = ()
    """differences from the recipe, without `--config.` in front."""
    programs: tuple[str, ...] = ("sample", "ppo")

    @property
    def name(self) -> str:
        return ": ".join((self.model, self.devices, " ".join(self.fields)))

    @property
    def command(self) -> list[str]:
        """Arguments of `launch/plan.py`."""
        kind = "--topology" if is_topology(self.devices) else "--devices"
        recipe = f"{RECIPE}:{self.words}" if self.words else RECIPE
        return [f"--config={recipe}", f"{kind}={self.devices}", *(f"--config.{field}" for field in self.fields)]


class Goal(NamedTuple):
    """A time that one program is to have."""

    text: str
    row: Row
    ratio: float
    """its time over the least that its operations and bytes take, at most."""
    limit_text: str


ADAPTERS, EXPERT = "OpenVLA-7B, adapters", "pi0.5, action expert"
REMAT = "model.execution.remat=full"
_CHIP = ("mesh.data=1", "env.num_workers=32", "model.prompt_length=32")
_UPDATE = ("mesh.fsdp=16", "ppo.minibatch_size=256", "ppo.microbatch_size=128")
GOALS = (
    Goal(
        "pi0.5, 32 chunks, one v5e",
        Row(EXPERT, "v5e:2x2", 1, "pi05", (*_CHIP, "ppo.context_gb=0"), ("sample",)),
        1.4,
        "1.4 times",
    ),
    Goal("OpenVLA, 32 decisions, one v5p", Row(ADAPTERS, "v5p:2x2x1", 1, "", _CHIP, ("sample",)), 1.6, "1.6 times"),
    Goal("OpenVLA, PPO, 256", Row(ADAPTERS, "v5e:4x4", 16, "", _UPDATE, ("ppo",)), 1 / 0.45, "45 % of the peak"),
)
"""Sampling on one chip, of the four of the smallest slice that libtpu knows, and an update of 256 decisions."""
GPUS = (
    Row("OpenVLA-7B, all weights", "1xH100", 1, "full", ("mesh.fsdp=1",)),
    Row("OpenVLA-7B, all weights", "1xH200", 1, "full", ("mesh.fsdp=1",)),
    Row("pi0.5, all weights", "1xH100", 1, "pi05,full", ("mesh.fsdp=1",)),
    Row("pi0.5, all weights", "1xH200", 1, "pi05,full", ("mesh.fsdp=1",)),
    Row(ADAPTERS, "1xH100", 1, "one_gpu"),
    Row(EXPERT, "1xH100", 1, "pi05,one_gpu"),
    Row("pi0.5, adapters", "1xH100", 1, "pi05,lora,one_gpu"),
    Row(ADAPTERS, "8xH100", 8),
    Row(EXPERT, "8xH100", 8, "pi05"),
    Row("pi0.5, adapters", "8xH100", 8, "pi05,lora"),
    Row("pi0.5, all weights", "8xH100", 8, "pi05,full"),
    Row("OpenVLA-7B, all weights", "8xH100", 8, "full"),
)
TPUS = (
    Row(ADAPTERS, "v5e:2x4", 8, "", ("mesh.fsdp=8", REMAT)),
    Row(EXPERT, "v5e:2x4", 8, "pi05", ("mesh.fsdp=8", "ppo.microbatch_size=960")),
    Row(ADAPTERS, "v5p:2x2x1", 4, "", ("mesh.fsdp=1",)),
    Row(EXPERT, "v5p:2x2x1", 4, "pi05"),
    Row(ADAPTERS, "v5e:4x4", 16, "", ("mesh.fsdp=16", REMAT)),
    Row(EXPERT, "v5e:4x4", 16, "pi05", ("mesh.fsdp=16",)),
    Row("pi0.5, adapters", "v5e:2x4", 8, "pi05,lora", ("mesh.fsdp=8", REMAT)),
    Row("pi0.5, all weights", "v5e:2x4", 8, "pi05,full"),
    Row("OpenVLA-7B, all weights", "v5e:2x4", 8, "full"),
    Row("OpenVLA-7B, all weights", "v5e:4x4", 16, "full", ("mesh.fsdp=16", "ppo.microbatch_size=16")),
    Row("OpenVLA-7B, all weights", "v5p:2x2x1", 4, "full", ("mesh.fsdp=4",)),
    Row("pi0.5, all weights", "v5p:2x2x1", 4, "pi05,full", ("mesh.fsdp=4",)),
    Row("pi0.5, adapters", "v5p:2x2x1", 4, "pi05,lora"),
    Row("pi0.5, adapters", "v5e:4x4", 16, "pi05,lora", ("mesh.fsdp=16", REMAT)),
    Row("pi0.5, all weights", "v5e:4x4", 16, "pi05,full", ("mesh.fsdp=16",)),
)
ROWS = (*(goal.row for goal in GOALS), *GPUS, *TPUS)
"""all rows, in the order in which they are compiled"""


def is_topology(devices: str) -> bool:
    return devices.startswith("v")


def chips_of(row: Row) -> Devices:
    return parse_topology(row.devices) if is_topology(row.devices) else parse_devices(row.devices)


# ---- Compilation ----------------------------------------------------------------------------------------------------


def fill(table: Table, rows: Sequence[Row], out: Path, kept: Path) -> None:
    """Adds to a table what is missing, and writes it after every program.

    Args:
        table: what is known already; changed in place.
        rows: that are to be known.
        out: file of the table.
        kept: folder of `launch/plan.py --kept`.
    """
    for row in rows:
        known = table.setdefault(row.name, {})
        for program in [name for name in row.programs if name not in known]:
            least = least_bytes(row, program)
            if least > chips_of(row).memory:
                known[program] = {"fits": False, "is_compiled": False, "least": least}
            elif (found := compile_program(row, program, kept)) is not None:
                known[program] = found | {"least": least}
            replace_text(out, json.dumps(table, indent=1) + "\n")


def config_of(row: Row) -> RunConfig:
    sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "launch")) if folder not in sys.path]
    from configuration import load_configuration

    values = load_configuration(row.command[0].partition("=")[2], row.command[2:])
    config = from_dict(RunConfig, {name: value for name, value in values.items() if name != "name"})
    return with_mesh(config, row.number)


def least_bytes(row: Row, program: str) -> float:
    """Returns the bytes of a device that weights, optimiser state and gradients take, from shapes alone."""
    config = config_of(row)
    held = held_bytes(program, config)
    copies = 0 if program == "sample" else 1 if num_microbatches(config, program) == 1 else 2
    return held.total + copies * held.trained


def compile_program(row: Row, program: str, kept: Path) -> dict[str, Any] | None:
    """Returns what `launch/plan.py` finds of a program; None where it failed, which it has said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        options = [f"--programs={program}", "--tries=0", f"--json={file}", f"--kept={kept}"]
        say(f"{row.name}: {program}")
        subprocess.run([sys.executable, ROOT / "launch" / "plan.py", *row.command, *options], check=False)
        return json.loads(file.read_text("utf-8"))[program] if file.exists() else None


# ---- Pages ----------------------------------------------------------------------------------------------------------


def row_cells(row: Row, table: Table) -> list[str]:
    """Returns a row of the table: sampling and PPO, each fits or not, with its times."""
    known, chip = table.get(row.name, {}), chips_of(row)
    sample, ppo = (known.get(program) for program in ("sample", "ppo"))
    return [
        row.model,
        row.devices,
        " ".join(row.fields) or "—",
        _memory(sample, chip),
        _rate(sample, chip),
        _memory(ppo, chip),
        _update(ppo, chip),
    ]


def least_seconds(found: dict[str, Any], devices: Devices) -> tuple[float, float | None]:
    """Returns a program's roofline, and XLA's time with all exchanges after it; None where there is no estimate."""
    roofline = max(found["products_s"], found["exchange_s"])
    if found["cycles"] is None or devices.chip.clock is None:
        return roofline, None
    return roofline, found["cycles"] / devices.chip.clock + found["exchange_s"]


def _memory(found: dict[str, Any] | None, devices: Devices) -> str:
    if found is None:
        return "not compiled yet"
    peak = found.get("peak", found["least"])
    size = f"{peak / GB:.1f} of {devices.memory / GB:.0f} GB"
    if found["is_compiled"]:
        return size if found["fits"] else f"**no**: {size}"
    return f"**no**: {size}, {'refused' if 'peak' in found else 'by sizes'}"


def _rate(found: dict[str, Any] | None, devices: Devices) -> str:
    if found is None or not found["fits"]:
        return "—"
    return _both(found, devices, lambda seconds: f"{found['num_rows'] / seconds:.3g}")


def _update(found: dict[str, Any] | None, devices: Devices) -> str:
    if found is None or not found["fits"]:
        return "—"
    return f"{found['num_rows']}: " + _both(found, devices, lambda seconds: f"{seconds:.3g} s")


def _both(found: dict[str, Any], devices: Devices, text) -> str:
    roofline, estimate = least_seconds(found, devices)
    return text(roofline) + (" / —" if estimate is None else f" / {text(estimate)}")


HEADER = ("", "devices", "beside the recipe", "sampling: memory", "decisions/s", "PPO: memory", "decisions: an update")
GOALS_HEADER = ("goal", "least", "XLA's time, exchanges", "reached", "goal, met")


def page(table: Table) -> str:
    """Returns the tables of docs/plan.md: the programs that there are goals for, and all rows."""
    goals = [GOALS_HEADER, ("---",) * len(GOALS_HEADER), *(goal_cells(goal, table) for goal in GOALS)]
    rows = [HEADER, ("---",) * len(HEADER), *(row_cells(row, table) for row in (*GPUS, *TPUS))]
    return "\n\n".join("\n".join(f"| {' | '.join(cells)} |" for cells in lines) for lines in (goals, rows))


def goal_cells(goal: Goal, table: Table) -> list[str]:
    """Returns what is known of a goal."""
    row, (program,) = goal.row, goal.row.programs
    found, chip = table.get(row.name, {}).get(program), chips_of(row).chip
    if found is None or not found["is_compiled"]:
        return [goal.text, "—", "not compiled yet", "—", goal.limit_text]
    config = config_of(row)
    if program == "ppo":
        least = found["needed"] / chip.peak.flops
    elif isinstance(config.model, Pi05Config):
        phases = sampling_phases(config.model, found["num_rows"], config.model.num_denoising_steps, 2)
        least = sum(phase.least_time(chip.peak) for phase in phases)
    else:
        rank = config.model.lora.rank
        phases = generation_phases(config.model, found["num_rows"], config.model.prompt_length, rank=rank)
        least = sum(phase.least_time(chip.peak) for phase in phases)
    computing = found["cycles"] / chip.clock
    seconds = computing + found["exchange_s"]
    is_met = seconds / least <= goal.ratio
    reached = f"{100 * least / seconds:.0f} %" if program == "ppo" else f"{seconds / least:.2f} times"
    times = f"{1000 * computing:.0f} + {1000 * found['exchange_s']:.0f} ms"
    return [goal.text, f"{1000 * least:.0f} ms", times, reached, f"{goal.limit_text}: {'yes' if is_met else '**no**'}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="TEXT", help="rows with this text in model, devices or recipe")
    parser.add_argument("--out", type=home_path, default=OUT, metavar="FILE", help=f"the table (default: {OUT.name})")
    parser.add_argument("--kept", type=home_path, default=ROOT / "runs" / "plans", metavar="DIR", help="of plan.py")
    parser.add_argument("--show", action="store_true", help="print the tables and compile nothing")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # where libtpu is installed, JAX would look for a TPU
    table: Table = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    if not arguments.show:
        fill(table, [row for row in ROWS if arguments.rows in f"{row.name} {row.words}"], arguments.out, arguments.kept)
    print(page(table))


if __name__ == "__main__":
    main()
