"""The report of a run: a table in the terminal and `report.html`, from the files of the run directory alone."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.summary import Comparison, Summary, compare, load_evaluation, summarize
from stare_jax.logging import print_table, read_metrics
from stare_jax.report.figures import PALETTE, dark_path, draw_curves, draw_rates
from stare_jax.report.page import Html, element, film, join, page, picture, shares, table

_PHASE_ORDER = ("expert", "sft", "tpo", "ppo")
_AREA_NAMES = {"env": "simulator", "policy": "policy", "update": "update", "data": "data", "other": "other"}
_OUTCOMES = {"success_once": "success at any step", "success_end": "success at the end"}


class PhaseResult(NamedTuple):
    """What `eval/<phase>.json` says."""

    phase: str
    evaluation: Evaluation
    summary: Summary
    media: Mapping[str, Any]
    """videos, timeline, filmstrip, with paths relative to the run directory."""


def load_results(run_directory: str | Path) -> list[PhaseResult]:
    """Returns the evaluations of a run directory in the order of the phases, others after them by name."""
    results = []
    for path in Path(run_directory).glob("eval/*.json"):
        evaluation = load_evaluation(path)
        results.append(PhaseResult(path.stem, evaluation, summarize(evaluation), json.loads(path.read_text())))
    ranks = {phase: rank for rank, phase in enumerate(_PHASE_ORDER)}
    return sorted(results, key=lambda result: (ranks.get(result.phase, len(ranks)), result.phase))


def print_report(run_directory: str | Path) -> None:
    """Prints the tables of `report.html`: rates with intervals, paired differences, stage by stage."""
    results = load_results(run_directory)
    if not results:
        print(f"{run_directory}: no evaluation yet")
        return
    env_id = results[0].evaluation.info.env_id
    print_table(*_rates_table(results), title=f"{env_id}, with 95 % Wilson intervals")
    print()
    print_table(*_stages_table(results), title="P(stage | the stage before), % and counts")
    if len(results) > 1:
        print()
        print_table(*_differences_table(results), title="Paired differences on the same seeds, 95 % Tango interval")


def write_report(run_directory: str | Path) -> Path:
    """Writes `report.html` and its figures from what the run directory holds, and returns its path.

    Reads `eval/*.json` with the films and pictures they name, `metrics.jsonl`, `config.json`, `<phase>/versions.json`;
    whatever is missing is left out.
    """
    run_directory = Path(run_directory)
    results = load_results(run_directory)
    lines = read_metrics(run_directory)
    env_id = results[0].evaluation.info.env_id if results else "no evaluation yet"
    sections = [_header(run_directory, env_id, results)]
    if results:
        sections += [_success_section(run_directory, results), _stages_section(run_directory, results)]
        sections += [_episode_section(run_directory, results), _films_section(run_directory, results)]
    sections += [_pairs_section(lines), _curves_section(run_directory, lines), _time_section(lines, results)]
    sections += [_file_section(run_directory, "config.json", "Configuration")]
    for file in sorted(run_directory.glob("*/versions.json")):
        sections += [_file_section(run_directory, f"{file.parent.name}/{file.name}", "Versions and machine")]
    path = run_directory / "report.html"
    path.write_text(page(f"{run_directory.resolve().name}: {env_id}", *sections))
    return path


# ------------------------------------------------------------------------------------------------------------- tables

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def _rates_table(results: Sequence[PhaseResult]) -> Table:
    summaries = [result.summary for result in results]
    rates = {**_OUTCOMES, "contacted": "touched the object", "grasped": "held the object"}
    rows = [(name, *(_percent(getattr(s, field)) for s in summaries)) for field, name in rates.items()]
    rows.append(("median steps to success", *(_number(s.median_steps) for s in summaries)))
    rows.append(("episodes, distinct starts", *(f"{s.num_episodes}, {s.num_distinct}" for s in summaries)))
    if any(s.num_dropped for s in summaries):
        rows.append(("lost to a dead simulator", *(str(s.num_dropped) for s in summaries)))
    return ("% of episodes", *(result.phase for result in results)), rows


def _differences_table(results: Sequence[PhaseResult]) -> Table:
    header = ("difference", *(f"{name}, points" for name in _OUTCOMES.values()), "won : lost : pairs")
    rows = []
    for later, earlier in _pairs_of_phases(results):
        comparisons = [compare(later.evaluation, earlier.evaluation, outcome) for outcome in _OUTCOMES]
        counts = f"{comparisons[0].num_gained} : {comparisons[0].num_lost} : {comparisons[0].num_pairs}"
        rows.append((f"{later.phase} − {earlier.phase}", *map(_points, comparisons), counts))
    return header, rows


def _stages_table(results: Sequence[PhaseResult]) -> Table:
    header = ("stage", *(result.phase for result in results))
    rows = []
    for k, name in enumerate(results[0].evaluation.info.stage_names):
        stages = [result.summary.stages[k] for result in results]
        cells = [f"{_percent(stage.rate)} ({stage.num_completed}/{stage.num_given})" for stage in stages]
        rows.append((name, *cells))
    return header, rows


def _pairs_of_phases(results: Sequence[PhaseResult]) -> list[tuple[PhaseResult, PhaseResult]]:
    """Every phase against the one before it and against the first that was trained."""
    results = [result for result in results if result.phase != "expert"] or list(results)
    pairs = []
    for index, later in enumerate(results[1:], start=1):
        earlier = [results[index - 1]] + ([results[0]] if index > 1 else [])
        pairs += [(later, other) for other in earlier if other.evaluation.info.env_id == later.evaluation.info.env_id]
    return pairs


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:g}"


def _percent(rate: Estimate) -> str:
    if math.isnan(rate.value):
        return "–"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _points(comparison: Comparison) -> str:
    difference = comparison.difference
    if math.isnan(difference.value):
        return "–"
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


# ----------------------------------------------------------------------------------------------------------- sections


def _header(run_directory: Path, env_id: str, results: Sequence[PhaseResult]) -> Html:
    parts = [element("h1", env_id), element("p", f"Run {run_directory.resolve().name}", class_="muted")]
    if not results:
        return join([*parts, element("p", "No phase has been evaluated yet.")])
    last = results[-1]
    rate = last.summary.success_once
    cards = [_card(f"{100 * rate.value:.0f} %", f"success at any step after {last.phase}", _percent(rate))]
    end = last.summary.success_end
    cards.append(_card(f"{100 * end.value:.0f} %", "success at the end of the episode", _percent(end)))
    if pairs := _pairs_of_phases(results):
        later, earlier = pairs[-1]
        comparison = compare(later.evaluation, earlier.evaluation)
        gain = f"{100 * comparison.difference.value:+.0f} points"
        cards.append(_card(gain, f"{later.phase} against {earlier.phase}, same seeds", _points(comparison)))
    return join([*parts, element("div", *cards, class_="cards")])


def _card(number: str, what: str, interval: str) -> Html:
    return element("div", element("b", number), what, element("div", interval, class_="muted"), class_="card")


def _success_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    note = (
        "% of episodes with 95 % Wilson intervals for the number of distinct starts; every episode runs to the "
        "horizon. Episodes lost to a dead simulator are left out and counted."
    )
    series = {r.phase: [getattr(r.summary, outcome) for outcome in _OUTCOMES] for r in results}
    draw_rates(list(_OUTCOMES.values()), series, run_directory / "figures/success.png")
    parts = [element("h2", "Success"), table(*_rates_table(results)), element("p", note, class_="muted")]
    parts.append(_picture(run_directory, "figures/success.png", "Success of each phase, with 95 % intervals."))
    if len(results) > 1:
        explained = (
            "Points of success, with Tango's 95 % score interval for pairs; won : lost counts the seeds on which "
        )
        explained += "only the later or only the earlier phase succeeded at any step."
        parts += [element("h3", "Paired differences on the same seeds"), table(*_differences_table(results))]
        parts.append(element("p", explained, class_="muted"))
    return join(parts)


def _stages_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    names = results[0].evaluation.info.stage_names
    series = {r.phase: [stage.rate for stage in r.summary.stages] for r in results}
    draw_rates(names, series, run_directory / "figures/stages.png")
    note = "P(stage completed | the stage before completed), in %, and counts: this is where episodes are lost."
    image = _picture(run_directory, "figures/stages.png", "Conditional stage success of each phase.")
    return join([element("h2", "Stage by stage"), table(*_stages_table(results)), element("p", note), image])


def _episode_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    parts = [element("h2", "One episode, stage by stage")]
    for result in reversed(results):
        if "timeline" not in result.media:
            continue
        caption = (
            f"{result.phase}, seed {result.media['timeline_seed']}: label, potential and shaped reward, which ends at "
            "the first success, where training would have stopped."
        )
        pictures = [_picture(run_directory, result.media["timeline"], caption)]
        if "filmstrip" in result.media:
            pictures.append(_picture(run_directory, result.media["filmstrip"], "The same episode in pictures."))
        is_first = len(parts) == 1
        folded = element("details", element("summary", f"After {result.phase}"), *pictures)
        parts.append(join(pictures) if is_first else folded)
    return join(parts) if len(parts) > 1 else Html("")


def _films_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    parts = [element("h2", "Films")]
    for result in reversed(results):
        videos = [video for video in result.media.get("videos", []) if (run_directory / video["file"]).exists()]
        if videos:
            films = [film(video["file"], f"seed {video['seed']}: {video['outcome']}") for video in videos]
            parts += [element("h3", f"After {result.phase}"), element("div", *films, class_="films")]
    return join(parts) if len(parts) > 1 else Html("")


def _pairs_section(lines: Sequence[Mapping[str, Any]]) -> Html:
    counted = [line for line in lines if "pairs/num_pairs" in line]
    if not counted:
        return Html("")
    counts = {name.removeprefix("pairs/"): f"{n:.0f}" for name, n in counted[-1].items() if name.startswith("pairs/")}
    total = counts.pop("num_pairs")
    rows = [(name.replace("_", " "), count) for name, count in counts.items()]
    note = "What decides, success or the number of stages completed, and whether both began in the same state."
    parts = [element("h2", "Preference pairs"), table(("kind", "pairs"), [*rows, ("all", total)])]
    return join([*parts, element("p", note, class_="muted")])


def _curves_section(run_directory: Path, lines: Sequence[Mapping[str, Any]]) -> Html:
    parts = [element("h2", "Learning curves")]
    for phase in _phases(lines):
        path = f"figures/curves_{phase}.png"
        if draw_curves(lines, phase, run_directory / path):
            parts += [element("h3", phase), _picture(run_directory, path, f"Metrics of the {phase} phase by its step.")]
    return join(parts) if len(parts) > 1 else Html("")


def _time_section(lines: Sequence[Mapping[str, Any]], results: Sequence[PhaseResult]) -> Html:
    parts = [element("h2", "Where the time went")]
    for phase in _phases(lines):
        seconds = phase_seconds(lines, phase)
        total = sum(seconds.values())
        if total > 0:
            colours = dict(zip(_AREA_NAMES, PALETTE, strict=False))
            bar = [(_AREA_NAMES.get(a, a), s / total, colours.get(a, PALETTE[-1])) for a, s in seconds.items()]
            parts += [element("h3", f"{phase}: {_duration(total)}"), shares(bar)]
    for phase, evaluation, _, _ in results:
        wall_s, num_steps = evaluation.info.wall_s, evaluation.info.num_steps
        rate = f"{num_steps} steps, {num_steps / wall_s:.0f} a second" if wall_s > 0 else f"{num_steps} steps"
        parts.append(element("p", f"Evaluation of {phase}: {_duration(wall_s)}, {rate}.", class_="muted"))
    return join(parts) if len(parts) > 1 else Html("")


def phase_seconds(lines: Sequence[Mapping[str, Any]], phase: str) -> dict[str, float]:
    """Returns wall seconds by area of a phase, from its metrics `time/<area>_s`: the seconds since the line before."""
    seconds: dict[str, float] = {}
    for line in lines:
        if line["phase"] == phase:
            for name in line:
                if name.startswith("time/") and name.endswith("_s"):
                    area = name.removeprefix("time/").removesuffix("_s")
                    seconds[area] = seconds.get(area, 0.0) + line[name]
    known = [area for area in _AREA_NAMES if area in seconds]
    return {area: seconds[area] for area in known + sorted(seconds.keys() - set(known))}


def _file_section(run_directory: Path, name: str, title: str) -> Html:
    path = run_directory / name
    if not path.exists():
        return Html("")
    content = element("details", element("summary", name), element("pre", path.read_text()))
    return join([element("h2", title), content])


def _picture(run_directory: Path, path: str, caption: str) -> Html:
    if not (run_directory / path).exists():
        return Html("")
    dark = dark_path(path)
    return picture(path, dark.as_posix() if (run_directory / dark).exists() else None, caption)


def _phases(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["phase"] for line in lines))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
