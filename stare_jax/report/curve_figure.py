"""Figure of learning curves of several runs side by side: panels of curves, and evaluations beside them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from stare_jax.evaluate.intervals import Estimate
from stare_jax.report.figures import LIGHT, PALETTE, Theme, save_figure, style_axis


class Curve(NamedTuple):
    """Metric of one run, `[I]` each: as it was logged, and smoothed."""

    x: np.ndarray
    raw: np.ndarray
    smooth: np.ndarray


class Panel(NamedTuple):
    """Curves by label, and the evaluations `before` and `after` them: phase -> label -> estimates."""

    title: str
    x_label: str
    curves: Mapping[str, Sequence[Curve]]
    means: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """label -> x and y of the mean over its runs; none for a single run."""
    before: Mapping[str, Mapping[str, Sequence[Estimate]]]
    after: Mapping[str, Mapping[str, Sequence[Estimate]]]


def draw_comparison(successes: Sequence[Panel], others: Sequence[Panel], path: str | Path, *, target: float) -> None:
    """Draws runs side by side, a colour a label: thin lines are runs, thick ones means, dots values before smoothing.

    Args:
        successes: the tall panels of the first row, rates in [0, 1], shown in % with the target.
        others: the panels below.
        path: file to write.
        target: rate to mark.
    """
    num_columns = len(successes)
    num_rows = 1 + math.ceil(len(others) / num_columns)
    heights = [2.9] + [1.65] * (num_rows - 1)
    labels = list(successes[0].curves)
    looks = {
        name: (PALETTE[i % len(PALETTE)], ("-", "--", ":")[i // len(PALETTE) % 3]) for i, name in enumerate(labels)
    }

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=heights).ravel()
        for index, (axis, panel) in enumerate(zip(axes, (*successes, *others), strict=False)):
            style_axis(axis, theme)
            is_rate = index < num_columns
            _draw_panel(axis, panel, looks, 100 if is_rate else 1)
            axis.set_title(panel.title, color=theme.text, fontsize=10 if is_rate else 9, loc="left")
            if is_rate or index + num_columns >= num_columns + len(others):
                axis.set_xlabel(panel.x_label)
            if is_rate:
                axis.axhline(100 * target, color=theme.text, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
                axis.set_ylim(_floor_of(panel), 102)
                _draw_evaluations(axis, panel, looks, theme)
        for axis in axes[num_columns + len(others) :]:
            axis.set_visible(False)
        axes[0].set_ylabel("% of episodes")
        handles = _legend(successes[0], looks, theme, target)
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=num_legend_columns,
            frameon=False,
            labelcolor=theme.text,
            fontsize=9,
            handlelength=1.8,
            columnspacing=1.6,
        )

    names = [handle.get_label() for handle in _legend(successes[0], looks, LIGHT, target)]
    num_legend_columns = len(names) if sum(len(name) + 8 for name in names) <= 130 else 3
    num_legend_rows = math.ceil(len(names) / num_legend_columns)
    size = (9.2, sum(heights) + 0.3 * num_rows + 0.25 * num_legend_rows)
    save_figure(draw, path, size=size)


def _draw_panel(axis: Axes, panel: Panel, looks: Mapping[str, tuple[str, str]], scale: float) -> None:
    for label, curves in panel.curves.items():
        colour, style = looks[label]
        has_mean = label in panel.means
        for x, raw, smooth in curves:
            axis.plot(x, scale * raw, ".", color=colour, ms=3, mew=0, alpha=0.4, zorder=2)
            width, alpha = (1, 0.8) if has_mean else (2.2, 1)
            axis.plot(x, scale * smooth, style, color=colour, linewidth=width, alpha=alpha, zorder=3)
        if has_mean:
            x, y = panel.means[label]
            axis.plot(x, scale * y, style, color=colour, linewidth=2.4, zorder=4)
    axis.set_xlim(0, 1.01 * _end_of(panel))
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_evaluations(axis: Axes, panel: Panel, looks: Mapping[str, tuple[str, str]], theme: Theme) -> None:
    """Draws evaluations in strips of their own beside the curves, so that their intervals can be told apart."""
    end = _end_of(panel)
    limits = list(axis.get_xlim())
    for phases, edge, direction, fill in ((panel.before, 0, -1, "none"), (panel.after, limits[1], 1, None)):
        for phase, by_label in phases.items():
            marks = [(label, estimate) for label, estimates in by_label.items() for estimate in estimates]
            width = (0.045 + 0.026 * len(marks)) * end
            outer = edge + direction * width
            axis.axvspan(*sorted((edge, outer)), color=theme.grid, alpha=0.45, linewidth=0, zorder=0)
            axis.text(
                (edge + outer) / 2,
                0.012,
                phase,
                ha="center",
                va="bottom",
                transform=axis.get_xaxis_transform(),
                color=theme.muted,
                fontsize=8,
            )
            for place, (label, estimate) in enumerate(marks):
                x = min(edge, outer) + width * (place + 0.5) / len(marks)
                value, low, high = (100 * part for part in estimate)
                error = np.maximum([[value - low], [high - value]], 0)
                axis.errorbar(
                    x,
                    value,
                    error,
                    fmt="o" if direction < 0 else "D",
                    ms=4.5,
                    color=looks[label][0],
                    mfc=fill or looks[label][0],
                    elinewidth=1.1,
                    capsize=0,
                    zorder=5,
                )
            limits[(direction + 1) // 2] = outer
    ticks = [tick for tick in axis.get_xticks() if 0 <= tick <= end]
    axis.set_xticks(ticks)
    axis.set_xlim(limits)


def _legend(panel: Panel, looks: Mapping[str, tuple[str, str]], theme: Theme, target: float) -> list[Line2D]:
    handles = [
        Line2D([], [], color=c, linestyle=style, linewidth=2.4, label=name) for name, (c, style) in looks.items()
    ]
    handles.append(
        Line2D([], [], color=theme.text, linestyle=(0, (4, 3)), linewidth=1, label=f"target, {100 * target:g} %")
    )
    for phases, mark, fill in ((panel.before, "o", "none"), (panel.after, "D", theme.muted)):
        handles += [
            Line2D(
                [], [], color=theme.muted, marker=mark, mfc=fill, ms=5, linestyle="", label=f"evaluated after {phase}"
            )
            for phase in phases
        ]
    return handles


def _end_of(panel: Panel) -> float:
    return max(float(curve.x[-1]) for curves in panel.curves.values() for curve in curves) or 1.0


def _floor_of(panel: Panel) -> float:
    """Returns the lower end of an axis of rates, in %: 0, or a multiple of 10 well below all that the panel shows."""
    lows = [curve.raw for curves in panel.curves.values() for curve in curves]
    marks = [
        e.low for by_label in (*panel.before.values(), *panel.after.values()) for es in by_label.values() for e in es
    ]
    lowest = np.nanmin(np.concatenate([*lows, marks, [1.0]]))
    return max(0.0, 10 * math.floor(10 * lowest - 0.5)) if lowest > 0.3 else 0.0
