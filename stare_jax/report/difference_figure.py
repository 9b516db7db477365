"""Figure of differences of rates with their intervals, on both sides of zero."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stare_jax.evaluate.intervals import Estimate
from stare_jax.report.figures import PALETTE, Theme, save_figure, style_axis


def draw_differences(
    groups: Sequence[str], series: Mapping[str, Sequence[Estimate]], path: str | Path, *, title: str = ""
) -> None:
    """Draws differences as dots with their intervals, in points of %; those that are NaN are left out.

    Args:
        groups: what is changed, one cluster of dots each.
        series: what is measured -> one difference a group, in [-1, 1].
        path: file to write.
        title: title of the figure.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axis = figure.subplots()
        style_axis(axis, theme)
        axis.set_title(title, color=theme.text, fontsize=11, loc="left")
        axis.axhline(0, color=theme.text, linewidth=1, zorder=1.5)
        width = 0.5 / len(series)
        for index, (name, estimates) in enumerate(series.items()):
            x = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            value, low, high = (100 * np.array(part, float) for part in zip(*estimates, strict=True))
            error = np.maximum([value - low, high - value], 0)
            axis.errorbar(
                x, value, error, fmt="o", ms=6, color=PALETTE[index % len(PALETTE)], elinewidth=1.6, label=name
            )
            for at, number in zip(x, value, strict=True):
                if math.isfinite(number):
                    axis.annotate(
                        f"{number:+.0f}",
                        (at, number),
                        (6, 0),
                        textcoords="offset points",
                        va="center",
                        color=theme.text,
                        fontsize=9,
                    )
        axis.set_xticks(range(len(groups)), groups)
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.set_ylabel("points of %, 95 % interval")
        axis.grid(False, axis="x")
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(series),
            frameon=False,
            labelcolor=theme.text,
            fontsize=9,
        )

    save_figure(draw, path, size=(8.4, 3.4))
