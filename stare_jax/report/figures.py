"""Figures of a run: learning curves, success with intervals, one episode stage by stage.

Every figure is written twice, `name.png` for a light page and `name_dark.png` for a dark one, without pyplot, so that
nothing global is touched and no display is needed.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stare_jax.evaluate.intervals import Estimate
from stare_jax.logging import last_lines, replace_bytes
from stare_jax.report.timeline import Timeline

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
SUCCESS = "#009E73"
MAX_BESIDE_TITLE = 4
"""Most names of a legend for which there is room beside a title."""


class Theme(NamedTuple):
    text: str
    muted: str
    grid: str
    background: str


LIGHT = Theme(text="#1f2328", muted="#59636e", grid="#e3e7ec", background="#ffffff")
DARK = Theme(text="#e6edf3", muted="#9198a1", grid="#2d333b", background="#161b22")


def dark_path(path: str | Path) -> Path:
    """Returns the file of the dark version of a figure."""
    path = Path(path)
    return path.with_name(f"{path.stem}_dark{path.suffix}")


def draw_timeline(
    timeline: Timeline,
    stage_names: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    frames: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Draws label, potential and shaped reward of one episode over its steps, on bands of the stages' colours.

    Args:
        timeline: timeline of the episode.
        stage_names: K names.
        path: file to write.
        title: title of the figure.
        frames: step -> uint8 `[H, W, 3]`, images to show above, in this order.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        figure.suptitle(title, color=theme.text, fontsize=11, x=0.01, ha="left")
        panels = figure
        if frames:
            strip, panels = figure.subfigures(2, 1, height_ratios=(1.0, 3.2))
            strip.set_facecolor("none")
            panels.set_facecolor("none")
            _draw_strip(strip, frames, timeline, stage_names, theme)
        axes = panels.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.3, 1.3))
        num_states = len(timeline.stage_t)
        for axis in axes:
            style_axis(axis, theme)
            _draw_bands(axis, timeline.stage_t)
            axis.set_xlim(-0.5, num_states - 0.5)
        steps = np.arange(num_states)
        axes[0].step(steps, timeline.stage_t, where="mid", color=theme.text, linewidth=1.6)
        axes[0].set_yticks(range(len(stage_names)), stage_names)
        axes[0].set_ylim(-0.5, len(stage_names) - 0.5)
        axes[0].set_ylabel("stage g(t)")
        axes[1].plot(steps, timeline.potential_t, color=theme.text, linewidth=1.6)
        axes[1].set_ylim(-0.05, 1.05)
        axes[1].set_ylabel("potential Φ")
        axes[2].axhline(0, color=theme.muted, linewidth=0.8)
        axes[2].plot(steps[:-1] + 0.5, timeline.shaped_reward_t, color=theme.text, linewidth=1.4, marker=".", ms=4)
        axes[2].set_ylabel("shaped reward r′")
        axes[2].set_xlabel("step")
        _mark_success(axes, timeline, theme)

    save_figure(draw, path, size=(8.4, 7.0 if frames else 5.6))


def _draw_strip(strip, frames, timeline: Timeline, stage_names: Sequence[str], theme: Theme) -> None:
    """Draws images side by side, each framed in the colour of its stage."""
    for axis, (t, image) in zip(strip.subplots(1, len(frames), squeeze=False)[0], frames.items(), strict=True):
        stage = int(timeline.stage_t[t])
        axis.imshow(image)
        axis.set_xticks([])
        axis.set_yticks([])
        success = " ✓" if timeline.success_t[t] else ""
        axis.set_xlabel(f"{t}: {stage_names[stage]}{success}", color=theme.text, fontsize=8)
        for spine in axis.spines.values():
            spine.set_color(PALETTE[stage % len(PALETTE)])
            spine.set_linewidth(2)


def draw_rates(
    groups: Sequence[str], series: Mapping[str, Sequence[Estimate]], path: str | Path, *, title: str = ""
) -> None:
    """Draws rates as bars with their intervals.

    Args:
        groups: what is measured, one cluster of bars each.
        series: who is measured -> one estimate a group.
        path: file to write.
        title: title of the figure.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        style_axis(axis, theme)
        axis.set_title(title, color=theme.text, fontsize=11, loc="left")
        width = 0.8 / len(series)
        for index, (name, estimates) in enumerate(series.items()):
            x = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            value, low, high = (100 * np.array(part, float) for part in zip(*estimates, strict=True))
            colour = PALETTE[index % len(PALETTE)]
            axis.bar(x, value, 0.9 * width, color=colour, label=name)
            axis.errorbar(
                x, value, np.maximum([value - low, high - value], 0), fmt="none", ecolor=theme.text, capsize=3
            )
            for at, top, number in zip(x, high, value, strict=True):
                if math.isfinite(number):
                    axis.text(at, top + 2, f"{number:.0f}", ha="center", color=theme.text, fontsize=9)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_ylim(0, 110)
        axis.set_yticks(range(0, 101, 20))
        axis.set_ylabel("% of episodes, 95 % interval")
        axis.grid(False, axis="x")
        look = {"frameon": False, "labelcolor": theme.text, "fontsize": 9}
        if len(series) > MAX_BESIDE_TITLE:
            figure.legend(loc="outside lower center", ncols=len(series), columnspacing=1.2, handlelength=1.2, **look)
        else:
            axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), **look)

    save_figure(draw, path, size=(8.4, 3.4))


def draw_curves(lines: Sequence[Mapping[str, Any]], phase: str, path: str | Path, *, max_panels: int = 9) -> list[str]:
    """Draws the learning curves of a phase and returns the names of the metrics drawn; writes nothing for none.

    Args:
        lines: of `metrics.jsonl`, as `read_metrics` returns them.
        phase: phase of the lines.
        path: file to write.
        max_panels: at most so many metrics, those that tell most first.
    """
    curves = {name: points for name, points in metric_curves(lines, phase).items() if len(points) > 1}
    names = sorted(filter(_is_about_learning, curves), key=_interest)[:max_panels]
    if not names:
        return []
    num_columns = min(3, len(names))
    num_rows = math.ceil(len(names) / num_columns)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axis, name in zip(axes, names, strict=False):
            style_axis(axis, theme)
            steps, values = np.array(list(curves[name].items())).T
            is_noisy = len(values) > 40
            axis.plot(
                steps, values, color=PALETTE[0], linewidth=0.8 if is_noisy else 1.5, alpha=0.35 if is_noisy else 1
            )
            if is_noisy:
                axis.plot(steps, _running_mean(values, len(values) // 20), color=PALETTE[0], linewidth=1.7)
            axis.set_title(name, color=theme.text, fontsize=9, loc="left")
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        figure.supxlabel("step", color=theme.muted, fontsize=9)

    save_figure(draw, path, size=(8.4, 0.4 + 1.9 * num_rows))
    return names


def metric_curves(lines: Sequence[Mapping[str, Any]], phase: str) -> dict[str, dict[int, float]]:
    """Returns metric -> step -> value of a phase, of the lines that count; see `last_lines`."""
    curves: dict[str, dict[int, float]] = {}
    for line in last_lines(lines, phase):
        for name in line.keys() - {"step", "phase", "wall_time"}:
            curves.setdefault(name, {})[line["step"]] = line[name]
    return curves


_MOST_INTERESTING = ("success", "loss", "accuracy", "margin", "return", "completed", "kl", "clip", "entropy", "value")


def _is_about_learning(name: str) -> bool:
    area, quantity = name.split("/", 1)
    return area not in ("time", "perf", "device") and not quantity.startswith("num_")


def _interest(name: str) -> tuple[int, str]:
    ranks = [rank for rank, word in enumerate(_MOST_INTERESTING) if word in name]
    return min(ranks, default=len(_MOST_INTERESTING)), name


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean over a centred window that shrinks at the ends; NaNs are left out."""
    kernel = np.ones(2 * (window // 2) + 1)
    is_finite = np.isfinite(values)
    sums = np.convolve(np.where(is_finite, values, 0.0), kernel, "same")
    counts = np.convolve(is_finite.astype(float), kernel, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _draw_bands(axis: Axes, stage_t: np.ndarray) -> None:
    edges = np.flatnonzero(np.diff(stage_t)) + 1
    for start, end in zip([0, *edges], [*edges, len(stage_t)], strict=True):
        colour = PALETTE[int(stage_t[start]) % len(PALETTE)]
        axis.axvspan(start - 0.5, end - 0.5, color=colour, alpha=0.22, linewidth=0, zorder=0)


def _mark_success(axes: Sequence[Axes], timeline: Timeline, theme: Theme) -> None:
    if not timeline.success_t.any():
        return
    first = int(timeline.success_t.argmax())
    for axis in axes:
        axis.axvline(first, color=SUCCESS, linestyle="--", linewidth=1.2)
    side = "right" if first > len(timeline.stage_t) / 2 else "left"
    text = "first success " if side == "right" else " first success"
    axes[0].text(first, -0.4, text, ha=side, va="bottom", color=theme.text, fontsize=8)


def style_axis(axis: Axes, theme: Theme) -> None:
    """Gives a panel the grid, ticks and colours of every figure."""
    axis.set_facecolor("none")
    axis.grid(True, color=theme.grid, linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.muted, labelsize=8, length=0)
    axis.xaxis.label.set_color(theme.muted)
    axis.yaxis.label.set_color(theme.muted)
    axis.yaxis.label.set_fontsize(9)
    axis.xaxis.label.set_fontsize(9)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(theme.grid)


def save_figure(draw_fn: Callable[[Figure, Theme], None], path: str | Path, *, size: tuple[float, float]) -> None:
    """Draws a figure once a theme and writes both PNG files; `size` in inches."""
    path = Path(path)
    for theme, to in ((LIGHT, path), (DARK, dark_path(path))):
        figure = Figure(figsize=size, dpi=144, facecolor=theme.background, layout="constrained")
        FigureCanvasAgg(figure)
        draw_fn(figure, theme)
        content = io.BytesIO()
        figure.savefig(content, format="png")
        replace_bytes(to, content.getvalue())
