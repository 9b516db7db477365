"""Report of a run: tables in the terminal and `report.html`, from the files of the run directory alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stare_jax.config import make_name
from stare_jax.evaluate.intervals import Estimate
from stare_jax.evaluate.record import PhaseResult, headline_results, load_results
from stare_jax.evaluate.summary import compare, pairing_obstacle
from stare_jax.logging import print_table, read_metrics, replace_text
from stare_jax.report.figures import PALETTE, dark_path, draw_curves, draw_rates
from stare_jax.report.page import Html, element, film, join, page, picture, shares, table
from stare_jax.report.perturbed import FOLDER as PERTURBED
from stare_jax.report.perturbed import load_perturbed, perturbed_table
from stare_jax.report.tables import (
    MISSING,
    OUTCOMES,
    differences_table,
    pairs_of_phases,
    percent,
    points,
    rates_table,
    stages_table,
    task_results,
    tasks_table,
)

_AREAS = {"env": "simulator", "policy": "policy", "update": "update", "data": "data", "other": "other"}
"""Areas of work in the metrics `time/<area>_s` -> their names on the page."""


def print_report(run_directory: str | Path) -> None:
    """Prints the tables of `report.html`: rates with intervals, paired differences, stage by stage."""
    results = load_results(run_directory)
    if not results:
        print(f"{run_directory}: no evaluation yet")
        return
    env_id = results[0].evaluation.info.env_id
    parts = task_results(results)
    if "" not in parts:
        for outcome in OUTCOMES:
            print_table(*tasks_table(results, outcome), title="Each task and their average, with 95 % intervals")
            print()
    print_table(*rates_table(results), title=f"{env_id}, with 95 % Wilson intervals")
    for task, of_task in parts.items():
        print()
        print_table(*stages_table(of_task), title=f"{task}  P(stage | the stage before), % and counts".strip())
    if len(results) > 1:
        print()
        print_table(
            *differences_table(results), title="Paired differences from the same initial states, 95 % Tango interval"
        )


def write_report(run_directory: str | Path) -> Path:
    """Writes `report.html` and its figures from the files of the run directory, and returns its path.

    Reads `eval/*.json` with the films and pictures they name, those of `ood/*/`, `metrics.jsonl`, `config.json` and
    `<phase>/versions.json`; missing files are left out. Page and figures are whole at every moment, also while a
    trainer writes the same ones.
    """
    run_directory = Path(run_directory)
    results = load_results(run_directory)
    lines = read_metrics(run_directory)
    env_id = results[0].evaluation.info.env_id if results else "no evaluation yet"
    sections = [_header(run_directory, env_id, results)]
    if results:
        sections += [_success_section(run_directory, results), _stages_section(run_directory, results)]
        sections += [_episode_section(run_directory, results), _films_section(run_directory, results)]
    sections += [_perturbed_section(run_directory)]
    sections += [_pairs_section(lines), _curves_section(run_directory, lines), _time_section(lines, results)]
    sections += [_file_section(run_directory, "config.json", "Configuration")]
    for file in sorted(run_directory.glob("*/versions.json")):
        sections += [_file_section(run_directory, f"{file.parent.name}/{file.name}", "Versions and machine")]
    path = run_directory / "report.html"
    replace_text(path, page(f"{run_directory.resolve().name}: {env_id}", *sections))
    return path


def _header(run_directory: Path, env_id: str, results: Sequence[PhaseResult]) -> Html:
    parts = [element("h1", env_id), element("p", f"Run {run_directory.resolve().name}", class_="muted")]
    if not results:
        return join([*parts, element("p", "No phase has been evaluated yet.")])
    headline = headline_results(results)
    last = headline[-1]
    rates = [(last.summary.success_once, f"success at any step after {last.phase}")]
    rates.append((last.summary.success_end, "success at the end of the episode"))
    cards = [_card(_percent_alone(rate), text, percent(rate)) for rate, text in rates]
    pairs = [pair for pair in pairs_of_phases(headline) if not pairing_obstacle(*(r.evaluation for r in pair))]
    if pairs:
        later, earlier = pairs[-1]
        comparison = compare(later.evaluation, earlier.evaluation)
        gain = f"{100 * comparison.difference.value:+.0f} points"
        cards.append(_card(gain, f"{later.phase} against {earlier.phase}, same initial states", points(comparison)))
    return join([*parts, element("div", *cards, class_="cards")])


def _percent_alone(rate: Estimate) -> str:
    return MISSING if math.isnan(rate.value) else f"{100 * rate.value:.0f} %"


def _card(number: str, text: str, interval: str) -> Html:
    return element("div", element("b", number), text, element("div", interval, class_="muted"), class_="card")


def _success_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    note = (
        "% of episodes, with 95 % Wilson intervals for the number of distinct starts. Every episode runs to the "
        "horizon. Episodes that were lost with a simulator three times are left out and counted."
    )
    series = {r.phase: [getattr(r.summary, outcome) for outcome in OUTCOMES] for r in results}
    draw_rates(list(OUTCOMES.values()), series, run_directory / "figures/success.png")
    parts = [element("h2", "Success")]
    if "" not in task_results(results):
        for outcome in OUTCOMES:
            parts.append(table(*tasks_table(results, outcome)))
        averages = (
            "The average is the mean over the tasks, with an interval from theirs. Rates below and in the figure are "
            "such averages."
        )
        parts.append(element("p", averages, class_="muted"))
    parts += [table(*rates_table(results)), element("p", note, class_="muted")]
    parts.append(_picture(run_directory, "figures/success.png", "Success of each phase, with 95 % intervals."))
    if len(results) > 1:
        explained = (
            "Points of success, with Tango's 95 % score interval for pairs. Two episodes are a pair if they began in "
            "the same state. won : lost counts the pairs in which only the later or only the earlier phase succeeded "
            "at any step."
        )
        title = "Paired differences from the same initial states"
        parts += [element("h3", title), table(*differences_table(results))]
        parts.append(element("p", explained, class_="muted"))
    return join(parts)


def _stages_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    note = "P(stage completed | the stage before completed), in %, and counts: a low rate names the stage that fails."
    parts = [element("h2", "Stage by stage")]
    for task, of_task in task_results(results).items():
        path = f"figures/stages_{make_name(task)}.png" if task else "figures/stages.png"
        series = {r.phase: [stage.rate for stage in r.summary.stages] for r in of_task}
        draw_rates(of_task[0].evaluation.info.stage_names, series, run_directory / path)
        parts += [element("h3", task)] if task else []
        parts += [table(*stages_table(of_task)), element("p", note)]
        parts.append(_picture(run_directory, path, f"Conditional stage success of each phase. {task}".strip()))
    return join(parts)


def _episode_section(run_directory: Path, results: Sequence[PhaseResult]) -> Html:
    parts = [element("h2", "One episode, stage by stage")]
    for result in reversed(results):
        if "timeline" not in result.media:
            continue
        caption = (
            f"{result.phase}, seed {result.media['timeline_seed']}: label, potential, and the shaped reward "
            "until training ends the episode."
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


def _perturbed_section(run_directory: Path) -> Html:
    parts = [element("h2", "Out of distribution")]
    for folder in sorted((run_directory / PERTURBED).glob("*")):
        evaluations = load_perturbed(folder)
        if "" in evaluations:
            seen = f"{PERTURBED}/{folder.name}/seen.png"
            parts += [element("h3", folder.name), table(*perturbed_table(evaluations))]
            parts += [_picture(run_directory, seen, "States of the first episode of each.")]
    note = (
        "% of episodes with Wilson's interval; differences from none in points, paired by seed, with a bootstrap over "
        "the undisturbed starts; all at 95 %."
    )
    return join([*parts, element("p", note, class_="muted")]) if len(parts) > 1 else Html("")


def _pairs_section(lines: Sequence[Mapping[str, Any]]) -> Html:
    counted = [line for line in lines if "pairs/num_pairs" in line]
    if not counted:
        return Html("")
    counts = {name.removeprefix("pairs/"): f"{n:.0f}" for name, n in counted[-1].items() if name.startswith("pairs/")}
    total = counts.pop("num_pairs")
    rows = [(name.replace("_", " "), count) for name, count in counts.items()]
    note = "Success or the number of completed stages decides a pair. Its episodes began in the same state or did not."
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
            colours = dict(zip(_AREAS, PALETTE, strict=False))
            bar = [(_AREAS.get(a, a), s / total, colours.get(a, PALETTE[-1])) for a, s in seconds.items()]
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
    known = [area for area in _AREAS if area in seconds]
    return {area: seconds[area] for area in known + sorted(seconds.keys() - set(known))}


def _file_section(run_directory: Path, name: str, title: str) -> Html:
    path = run_directory / name
    if not path.exists():
        return Html("")
    content = element("details", element("summary", name), element("pre", path.read_text("utf-8", errors="replace")))
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
