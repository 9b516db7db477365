"""Compares learning curves of several settings, each with one or more runs (seeds), side by side.

    python launch/compare.py --out=results/push "STA-PPO=runs/sta_0,runs/sta_1" "PPO=runs/ppo_0,runs/ppo_1"
    python launch/compare.py --out=results/kl --metrics=ppo/kl_last,ppo/epochs --target=0.9 "A=runs/a" "B=runs/b"
    python launch/compare.py --out=results/franka_state --study=runs/franka_state --target=0.8

Writes curves.png and curves_dark.png, curves.csv, and README.md with the tables that it also prints. Runs may
still be under way. Of a study's folder (launch/study.py) it writes these for every task, and above them README.md,
success.csv, stages.csv and differences.csv: success by method and task over seeds, beside the paper's numbers, its
claims, steps to the target, stages by method (figure 5), differences paired by seed, toggles of stages (figure 6), and
how the numbers were made; where runs have been evaluated out of distribution (launch/evaluate.py --perturb) also ood.md
and ood.csv, methods by perturbations. Text given with --command is put into the README, without the folders of absolute
paths.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import command

from stare_jax.config import ConfigError, home_path
from stare_jax.report.comparison import DIAGNOSTICS, Choices, print_comparison, write_comparison
from stare_jax.report.curves import CurveError, check_comparable, read_runs
from stare_jax.report.perturbed_study import write_perturbed_study
from stare_jax.report.study import write_study
from stare_jax.report.study_runs import find_runs

WRITTEN = ("README.md", "curves.csv", "curves.png", "curves_dark.png", "success.csv", "stages.csv")
WRITTEN += ("differences.csv", "ood.md", "ood.csv")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    add = parser.add_argument
    add("settings", nargs="*", metavar="LABEL=RUN[,RUN...]", help="a setting and its run directories")
    add("--study", type=command.path, metavar="FOLDER", help="a study's folder, in place of settings")
    add(
        "--baseline",
        default="ppo",
        metavar="METHOD",
        help="of a study: compare others with it (default: ppo)",
    )
    add("--out", type=command.path, required=True, metavar="FOLDER", help="folder to write into")
    add("--phase", default="ppo", help="phase of the metrics (default: ppo)")
    add("--metrics", metavar="NAME[,NAME...]", help=f"metrics of further panels (default: {','.join(DIAGNOSTICS)})")
    add("--target", type=float, default=0.95, help="success rate to reach (default: 0.95)")
    add("--smooth", type=command.count, default=5, metavar="N", help="iterations of the moving average (default: 5)")
    add("--command", action="append", default=[], help="command that made the runs, to record; may be repeated")
    arguments = parser.parse_args(argv)
    if bool(arguments.settings) == bool(arguments.study):
        parser.error("give settings, LABEL=RUN[,RUN...], or --study=FOLDER")
    if arguments.study and arguments.phase != "ppo":
        parser.error("--study compares the phase ppo")
    arguments.made_by = shlex.join(["python", "launch/compare.py", *(sys.argv[1:] if argv is None else argv)])
    return arguments


def parse_settings(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Returns label -> run directories.

    Raises:
        CurveError: a text is not LABEL=RUN[,RUN...], or two have one label.
    """
    settings: dict[str, list[Path]] = {}
    for text in texts:
        label, equals, names = (part.strip() for part in text.partition("="))
        directories = [home_path(name.strip()) for name in names.split(",") if name.strip()]
        if not equals or not label:
            raise CurveError(f"settings: got {text!r}, expected LABEL=RUN[,RUN...]")
        if not directories:
            raise CurveError(f"settings: got {text!r}, expected at least one run after {label}=")
        if label in settings:
            raise CurveError(f"settings: got the label {label!r} twice, expected the runs of a label in one argument")
        settings[label] = directories
    return settings


def make_choices(arguments: argparse.Namespace) -> Choices:
    if not 0 < arguments.target <= 1:
        raise CurveError(f"target: got {arguments.target:g}, expected in (0, 1]")
    metrics = DIAGNOSTICS
    if arguments.metrics is not None:
        metrics = tuple(dict.fromkeys(name.strip() for name in arguments.metrics.split(",") if name.strip()))
    return Choices(arguments.phase, metrics, arguments.target, arguments.smooth, tuple(arguments.command))


def check_out(out: Path) -> None:
    """Makes sure that an earlier comparison, whose README.md names its table, is replaced, and nothing else.

    Raises:
        ConfigError: the folder is used for something else.
    """
    readme, there = out / "README.md", [name for name in WRITTEN if (out / name).exists()]
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    if there and not any(f"[{name}]({name})" in text for name in ("curves.csv", "success.csv")):
        raise ConfigError(f"--out: got {out}, which has another {there[0]}, expected a folder of its own")


def compare_study(arguments: argparse.Namespace) -> None:
    """Writes and prints the tables and curves of a study's folder."""
    from configs.methods import METHODS

    rows = {name: method.row for name, method in METHODS.items()}
    choices, runs = make_choices(arguments), find_runs(arguments.study, list(METHODS))
    for task in {run.task for run in runs}:
        check_out(arguments.out / task)
    choices = choices._replace(commands=(arguments.made_by, *choices.commands))
    write_study(runs, arguments.out, choices, rows=rows, baseline=arguments.baseline)
    if path := write_perturbed_study(runs, arguments.out):
        print(f"written: {path}")
    print(f"written: {arguments.out / 'README.md'}")


def compare(arguments: argparse.Namespace) -> None:
    """Reads the runs, writes their comparison and prints it."""
    choices, settings = make_choices(arguments), parse_settings(arguments.settings)
    runs = read_runs(settings, choices.phase)
    if arguments.metrics is None:  # A default panel may be missing, one that was asked for by name may not.
        known = {name for run in runs for name in run.series.metrics}
        choices = choices._replace(metrics=tuple(name for name in DIAGNOSTICS if name in known))
    check_comparable(runs, choices.metrics)
    write_comparison(runs, arguments.out, choices)
    print_comparison(runs, choices)
    print(f"\nwritten: {arguments.out / 'README.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def work() -> None:
        check_out(arguments.out)
        (compare_study if arguments.study else compare)(arguments)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
