"""Summaries of a data set: tables of its episodes and stages, a picture of its episodes."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw

from stare_jax.data.filters import imitation_frames
from stare_jax.data.reader import Dataset
from stare_jax.stages import Separation, TaskSpec, separate, stage_costs, stage_mask

_TILE = 128
_CAPTION = 14


class StageSummary(NamedTuple):
    """One stage over all episodes of a data set."""

    name: str
    completed: float
    """Share of the episodes that complete it."""
    num_steps: float
    """Mean number of states, over the episodes that have any in it."""
    skipped: float
    """Share of the episodes that have no state in it."""
    cost: float
    """Mean cost l_k (3), over the episodes that have any state in it; NaN if none has, and so for `num_steps`."""


def summarize_episodes(dataset: Dataset) -> list[tuple[str, Any]]:
    """Returns names and numbers of the content of a data set that was collected, and of its losses."""
    lengths = np.array([episode.length for episode in dataset.episodes])
    groups = sorted(Counter(episode.noise_scale for episode in dataset.episodes).items())
    progress, num_skipped = dataset.manifest.progress, dataset.num_skipped
    return [
        ("episodes", dataset.num_episodes),
        *([("episodes lost in damaged shards", num_skipped)] if num_skipped else []),
        ("successful", sum(episode.success for episode in dataset.episodes)),
        *((f"with noise {scale:.3g}", number) for scale, number in groups if scale or len(groups) > 1),
        ("episodes tried", progress.get("num_attempts", 0)),
        ("lost with a simulator", progress.get("num_dropped", 0)),
        ("actions: mean", f"{lengths.mean():.1f}"),
        ("actions: 90 % quantile", f"{np.quantile(lengths, 0.9):.0f}"),
        ("actions: maximum", lengths.max()),
        ("frames", dataset.num_frames),
    ]


def summarize_import(dataset: Dataset) -> list[tuple[str, Any]]:
    """Returns names and numbers of the content of a data set that was imported, and of the dropped episodes."""
    lengths, progress = np.array([episode.length for episode in dataset.episodes]), dataset.manifest.progress
    return [
        ("episodes", dataset.num_episodes),
        ("episodes read", progress.get("num_read", 0)),
        *((f"dropped, {reason}", number) for reason, number in progress.get("dropped", {}).items()),
        ("instructions", len({episode.instruction for episode in dataset.episodes})),
        ("actions: mean", f"{lengths.mean():.1f}"),
        ("actions: 90 % quantile", f"{np.quantile(lengths, 0.9):.0f}"),
        ("actions: maximum", lengths.max()),
        ("actions", lengths.sum()),
        ("actions left out as idle", lengths.sum() - len(imitation_frames(dataset))),
        ("frames", dataset.num_frames),
    ]


def summarize_stages(dataset: Dataset, spec: TaskSpec) -> list[StageSummary]:
    """Returns a summary of every stage of the task."""
    signals, valid = dataset.signals()
    separation, length, cost = jax.device_get(_annotate(spec)(signals, valid))
    has_steps = length > 0
    number = has_steps.sum(axis=0)
    with np.errstate(invalid="ignore"):
        num_steps, mean_cost = length.sum(axis=0) / number, (cost * has_steps).sum(axis=0) / number
    columns = (spec.stage_names, separation.completed.mean(axis=0), num_steps, 1 - has_steps.mean(axis=0), mean_cost)
    return [StageSummary(name, *map(float, values)) for name, *values in zip(*columns, strict=True)]


def contact_sheet(
    dataset: Dataset, spec: TaskSpec | None, *, num_episodes: int = 6, num_columns: int = 8
) -> Image.Image:
    """Draws episodes as rows of frames, first to last, with the step and its stage below each.

    Args:
        dataset: with images; the first camera is shown.
        spec: the task; None leaves the stages out, where there is nothing to tell them by.
        num_episodes: rows, spread over the data set.
        num_columns: frames of an episode, spread over its length.

    Raises:
        ValueError: the data set has no images.
    """
    shapes = [shape for name, shape in dataset.manifest.shapes.items() if name.startswith("image/")]
    if not shapes:
        raise ValueError(f"{dataset.directory}: got no camera, expected one to show")
    size = _fitting(*shapes[0][:2])
    separation: Separation | None = spec and jax.device_get(_annotate(spec)(*dataset.signals())[0])
    rows = np.unique(np.linspace(0, dataset.num_episodes - 1, num_episodes).round().astype(int))
    height = size[1] + _CAPTION
    sheet = Image.new("RGB", (num_columns * _TILE, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, index in enumerate(rows):
        episode = dataset.episodes[index]
        for column, t in enumerate(np.unique(np.linspace(0, episode.length, num_columns).round().astype(int))):
            image = next(iter(dataset.frame(int(dataset.first_frame[index] + t))["images"].values()))
            corner = (column * _TILE, row * height)
            kind = Image.Resampling.NEAREST if size > image.shape[1::-1] else Image.Resampling.BOX
            sheet.paste(Image.fromarray(image).resize(size, kind), corner)
            caption = f"{index}: {t}"
            if spec is not None:
                caption += f" {spec.stage_names[separation.stage_t[index, t]]}"
                caption += (" success" if episode.success else " failure") if t == episode.length else ""
            draw.text((corner[0] + 2, corner[1] + size[1] + 1), caption, fill="black")
    return sheet


def _fitting(height: int, width: int) -> tuple[int, int]:
    """Returns the (width, height) at which an image is shown."""
    scale = _TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


@functools.lru_cache(maxsize=4)
def _annotate(spec: TaskSpec) -> Callable:
    def annotate(signals, valid):
        separation = separate(spec, signals, valid)
        length = stage_mask(separation, spec.num_stages, valid).sum(axis=-1)
        return separation, length, stage_costs(spec, signals, separation, valid)

    return jax.jit(jax.vmap(annotate))
