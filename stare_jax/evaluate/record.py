"""Files of evaluations in a run directory: `eval/<name>.json`, and `eval/<name>.partial/` of an unfinished one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stare_jax.config import check_name
from stare_jax.evaluate.episodes import Episodes
from stare_jax.evaluate.parts import delete_parts
from stare_jax.evaluate.protocol import EvalInfo, Evaluation
from stare_jax.evaluate.summary import Summary, summarize
from stare_jax.logging import move_aside, replace_text, say

PHASE_ORDER = ("expert", "sft", "tpo", "ppo")
"""Names of evaluations in the order in which they are shown; others follow."""


class PhaseResult(NamedTuple):
    """One evaluation of a run directory."""

    phase: str
    """Name of the file: the phase, or a name that the user gave."""
    evaluation: Evaluation
    summary: Summary
    media: Mapping[str, Any]
    """The whole file as JSON. Its keys `videos`, `timeline`, `timeline_seed` and `filmstrip` name its films and
    pictures, by paths relative to the run directory."""


def evaluation_file(run_directory: str | Path, name: str) -> Path:
    """Returns the file of an evaluation: `eval/<name>.json`.

    Raises:
        ConfigError: the name cannot be a file name.
    """
    return Path(run_directory) / "eval" / f"{check_name(name, 'name')}.json"


def set_aside_evaluation(run_directory: str | Path, name: str) -> None:
    """Makes room for an evaluation: moves one of that name, with its films and pictures, to `set_aside/<n>/`."""
    run_directory, file = Path(run_directory), evaluation_file(run_directory, name)
    if not file.exists():
        return
    document = json.loads(file.read_text())
    media = [
        *(video["file"] for video in document.get("videos", ())),
        document.get("timeline"),
        document.get("filmstrip"),
    ]
    folder = move_aside(run_directory, [file, *(run_directory / path for path in media if path)])
    say(f"{file} is evaluated again; what was there is in {folder}")


def partial_folder(file: str | Path) -> Path:
    """Returns the folder of the results so far, beside the file of an evaluation."""
    return Path(file).with_suffix(".partial")


def unused_name(run_directory: str | Path, phase: str) -> str:
    """Returns a name that replaces no evaluation: the phase, or `<phase>_again`, `<phase>_again2`, ..."""
    names = [phase, f"{phase}_again"]
    while evaluation_file(run_directory, names[-1]).exists():
        names.append(f"{phase}_again{len(names)}")
    return next(name for name in names if not evaluation_file(run_directory, name).exists())


def save_evaluation(
    file: str | Path,
    evaluation: Evaluation,
    *,
    phase: str,
    settings: Mapping[str, Any] | None = None,
    media: Mapping[str, Any] | None = None,
) -> None:
    """Writes an evaluation as JSON and deletes its partial folder.

    The file holds info, episodes, and a summary for readers, which is recomputed when the file is loaded.

    Args:
        file: see `evaluation_file`.
        evaluation: the result of `evaluate`.
        phase: name of the evaluation.
        settings: configuration of the evaluation, kept with it.
        media: films and pictures, see `PhaseResult`.
    """
    document = {
        "phase": phase,
        "settings": settings,
        "videos": [],
        **(media or {}),
        "info": evaluation.info._asdict(),
        "summary": _plain(summarize(evaluation)),
        "episodes": {name: field.tolist() for name, field in evaluation.episodes._asdict().items()},
    }
    replace_text(Path(file), json.dumps(document, indent=1) + "\n")
    delete_parts(partial_folder(file))


def load_evaluation(file: str | Path) -> Evaluation:
    """Reads a file of `save_evaluation`; fields that earlier versions did not keep are empty."""
    return _evaluation_of(json.loads(Path(file).read_text()))


def load_results(run_directory: str | Path) -> list[PhaseResult]:
    """Returns the evaluations of a run directory in the order of the phases, others after them by name."""
    results = []
    for file in Path(run_directory).glob("eval/*.json"):
        try:
            document = json.loads(file.read_text())
        except FileNotFoundError:  # Its run has just begun the phase again.
            continue
        evaluation = _evaluation_of(document)
        results.append(PhaseResult(file.stem, evaluation, summarize(evaluation), document))
    ranks = {phase: rank for rank, phase in enumerate(PHASE_ORDER)}
    return sorted(results, key=lambda result: (ranks.get(result.phase, len(ranks)), result.phase))


def headline_results(results: Sequence[PhaseResult]) -> list[PhaseResult]:
    """Returns one evaluation of each phase, in the order of the phases; the last one is what a run has come to.

    The evaluations that the run itself has made count: they alone have settings, they follow the run's one protocol,
    and each is of the weights that its phase ended with. Evaluations that were added by hand, with other seeds, weights
    or numbers of episodes, do not replace them. Where the run has made none, one that was added stands for each phase
    whose weights it is of: the one with the most episodes, and of equals the first by name. Where there is none of a
    phase either, it is the last of all.

    Args:
        results: as `load_results` returns them.
    """
    if own := [result for result in results if result.media.get("settings") is not None]:
        return own
    of_phase: dict[str, PhaseResult] = {}
    for result in results:
        phase = result.evaluation.info.checkpoint.partition("/")[0] or result.phase
        best = of_phase.get(phase)
        if phase in PHASE_ORDER[1:] and (best is None or result.summary.num_episodes > best.summary.num_episodes):
            of_phase[phase] = result
    return [of_phase[phase] for phase in PHASE_ORDER if phase in of_phase] or list(results[-1:])


def _evaluation_of(document: Mapping[str, Any]) -> Evaluation:
    info = EvalInfo(**document["info"])
    fields = {name: np.asarray(values) for name, values in document["episodes"].items()}
    fields.setdefault("start_hash", np.full(len(fields["seed"]), ""))
    return Evaluation(info._replace(stage_names=tuple(info.stage_names)), Episodes(**fields))


def _plain(value: Any) -> Any:
    """Returns nested records as dicts and NaN as None, because JSON knows neither."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
