"""Out of distribution over a study: methods by perturbations, from the evaluations that lie beside its runs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stare_jax.evaluate.intervals import Estimate, mean_interval
from stare_jax.evaluate.perturbed import Perturbed, against_undisturbed
from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.summary import summarize
from stare_jax.logging import print_table, replace_text
from stare_jax.report.comparison import markdown_table
from stare_jax.report.perturbed import AXES, by_axis, load_perturbed, ood_folder
from stare_jax.report.study_runs import StudyRun
from stare_jax.report.tables import MISSING, OUTCOMES, Table

PUBLISHED: Mapping[str, tuple[float, float, float, float]] = {
    "OpenVLA-7B before reinforcement learning": (53.91, 38.75, 35.94, 42.11),
    "RL4VLA, OpenVLA-7B (PPO)": (93.75, 80.47, 75.00, 81.77),
}
"""Policy -> success in %, in distribution, vision, semantics, execution: table of RLinf-VLA (arXiv:2510.06710), which
evaluated RL4VLA's weights on RL4VLA's task, PutOnPlateInScene25, with RL4VLA's perturbations."""


class PerturbedRun(NamedTuple):
    """A run of a study with its evaluations out of distribution."""

    task: str
    method: str
    seed: str
    evaluations: Mapping[str, Evaluation]
    """Perturbation -> evaluation, "" for the undisturbed one."""


def find_perturbed(runs: Sequence[StudyRun]) -> list[PerturbedRun]:
    """Returns the runs that have evaluations out of distribution of their last phase, in their order.

    Raises:
        DocumentError: a file is damaged.
    """
    found = []
    for directory, run in {run.directory: run for run in runs}.items():
        evaluations = load_perturbed(ood_folder(directory, run.config["phases"][-1]))
        if "" in evaluations and len(evaluations) > 1:
            task = evaluations[""].info.env_id
            found.append(PerturbedRun(task, run.method.partition(",")[0], run.seed, evaluations))
    return found


def axes_table(runs: Sequence[PerturbedRun], outcome: str) -> Table:
    """Returns one row a method, one column an axis: mean over perturbations and seeds, in %; below them published ones.

    Args:
        runs: of one task.
        outcome: "success_once" or "success_end"; published numbers are beside the first.
    """
    rows = []
    for method, group in _by_method(runs).items():
        undisturbed = [getattr(summarize(run.evaluations[""]), outcome) for run in group]
        cells = [_percent(undisturbed)]
        cells += [_percent([one.rate for one in _axis(group, axis, outcome)]) for axis in AXES]
        rows.append((method, *cells))
    if outcome == "success_once":
        for name, rates in PUBLISHED.items():
            rows.append((f"published, another task: {name}", *(f"{rate:.1f}" for rate in rates)))
    return (f"{OUTCOMES[outcome]}, %", "undisturbed", *AXES), rows


def differences_table(runs: Sequence[PerturbedRun], outcome: str) -> Table:
    """Returns one row a perturbation, one column a method: the difference from undisturbed, in points."""
    methods, names = _by_method(runs), list(dict.fromkeys(name for run in runs for name in run.evaluations if name))
    rows = []
    for name in names:
        cells = []
        for group in methods.values():
            pairs = [(run.evaluations[name], run.evaluations[""]) for run in group if name in run.evaluations]
            differences = [against_undisturbed([one], usual, outcome).difference for one, usual in pairs]
            cells.append(_percent(differences, sign="+"))
        rows.append((name, *cells))
    return (f"{OUTCOMES[outcome]}, points from undisturbed", *methods), rows


def _by_method(runs: Sequence[PerturbedRun]) -> dict[str, list[PerturbedRun]]:
    methods: dict[str, list[PerturbedRun]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _axis(runs: Sequence[PerturbedRun], axis: str, outcome: str) -> list[Perturbed]:
    means = []
    for run in runs:
        if names := by_axis(list(run.evaluations)).get(axis):
            means.append(against_undisturbed([run.evaluations[name] for name in names], run.evaluations[""], outcome))
    return means


def _percent(estimates: Sequence[Estimate], sign: str = "") -> str:
    """Returns the mean of runs with Student's interval and their number; of one run its own interval."""
    if not estimates:
        return MISSING
    estimate = estimates[0] if len(estimates) == 1 else mean_interval([one.value for one in estimates])
    value, low, high = (f"{100 * number:{sign}.1f}" for number in estimate)
    limits = "" if math.isnan(estimate.low) else f" [{low}, {high}]"
    return f"{value}{limits} ({len(estimates)})"


def csv_text(runs: Sequence[PerturbedRun]) -> str:
    """Returns one row for each run and perturbation: rates, differences from undisturbed, counts."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ("task", "method", "seed", "checkpoint", "perturbation", "episodes")
    writer.writerow((*header, *OUTCOMES, *(f"{outcome}_difference" for outcome in OUTCOMES)))
    for run in runs:
        usual = run.evaluations[""]
        for name, evaluation in run.evaluations.items():
            summary = summarize(evaluation)
            row = [run.task, run.method, run.seed, usual.info.checkpoint, name, summary.num_episodes]
            row += [f"{getattr(summary, outcome).value:.6g}" for outcome in OUTCOMES]
            pairs = [against_undisturbed([evaluation], usual, o).difference.value for o in OUTCOMES] if name else ()
            writer.writerow(row + [f"{difference:.6g}" for difference in pairs] + [""] * (0 if name else len(OUTCOMES)))
    return file.getvalue()


def write_perturbed_study(runs: Sequence[StudyRun], out: str | Path) -> Path | None:
    """Writes and prints the tables of a study out of distribution: `ood.md` and `ood.csv` in a folder.

    Returns:
        Path of `ood.md`; None where no run has such evaluations.
    """
    found, out = find_perturbed(runs), Path(out)
    if not found:
        return None
    parts = ["# Out of distribution"]
    for task in dict.fromkeys(run.task for run in found):
        of_task = [run for run in found if run.task == task]
        parts.append(f"## {task}")
        for table in (*(axes_table(of_task, o) for o in OUTCOMES), *(differences_table(of_task, o) for o in OUTCOMES)):
            print_table(*table, title=task)
            print()
            parts.append(markdown_table(*table))
    notes = (
        "Ours: mean over seeds (their number) with a 95 % Student interval; of one seed a 95 % bootstrap over its "
        "episodes, of its undisturbed rate Wilson's. An axis is the mean of its perturbations.",
        "Published: RLinf-VLA's evaluation of RL4VLA's weights on RL4VLA's task and perturbations; no run of this "
        "library, and not the tasks above.",
        "Every run and perturbation: [ood.csv](ood.csv).",
    )
    parts.append("\n".join(f"- {note}" for note in notes))
    replace_text(out / "ood.csv", csv_text(found))
    replace_text(out / "ood.md", "\n\n".join(parts) + "\n")
    return out / "ood.md"
