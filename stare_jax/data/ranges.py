"""Ranges by which a data set's actions and states are scaled: its quantiles, where they describe the data.

They do not where nearly all values of a dimension are noise: scaled by the width of the noise, the few others would be
thousands and more. And they do not describe another robot's data.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stare_jax.data.filters import imitation_frames
from stare_jax.data.reader import Dataset
from stare_jax.models.normalize import action_range, to_quantiles
from stare_jax.types import NormStats

MIN_ACTION_RANGE = 1e-4
"""least range of an action dimension that moves: 0.1 mm or 0.1 mrad, less than any arm shows, or 1e-4 of a controller's
own unit."""
MIN_QUANTILE_SHARE = 0.01
"""least share of the distance between minimum and maximum that an action dimension's quantiles have to span; those of
Bridge V2 span 0.026 at least."""
MAX_SCALED = 2 / MIN_QUANTILE_SHARE
"""largest number, about, that an action of a data set is scaled to by its own statistics"""
MIN_STATE_WIDTH = 1e-3
"""least range of a state dimension, metres or radians: noise must not reach from one bin of a prompt to the next."""
_NUM_FRAMES = 2000
_Columns = Mapping[str, np.ndarray]
"""columns of `documents.statistics.Quantiles`, float32 `[D]`"""


class Beyond(NamedTuple):
    """Demonstrations that lie beyond the range of statistics."""

    action: np.ndarray
    """float `[A]`, share of the values of each dimension that are cut off."""
    state: np.ndarray
    """float `[S]`, likewise."""
    farthest: np.ndarray
    """float `[A]`, largest distance from zero of a scaled action that is not cut off, as pi0.5 sees it."""


def scale_actions(columns: _Columns) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns low and high, float32 `[A]`, and a line on each dimension that is not scaled by quantiles that differ.

    A dimension whose range is less than `MIN_ACTION_RANGE` counts as one that never moves, high = low: its few other
    values are not imitated. One whose quantiles span less than `MIN_QUANTILE_SHARE` of its extremes has these.
    """
    low, high = action_range(columns, columns["mask"])
    least, most = columns.get("min", low), columns.get("max", high)
    span, reach = high - low, np.maximum(most - least, high - low)
    is_still = span < MIN_ACTION_RANGE
    is_narrow = ~is_still & (span < MIN_QUANTILE_SHARE * reach)
    lines = []
    for i in np.flatnonzero((is_still & (reach > 0)) | is_narrow):
        treated = "taken for one that never moves" if is_still[i] else "scaled by minimum and maximum"
        lines.append(f"action {i}: 98 % of its values lie within {span[i]:.2g}, all within {reach[i]:.2g}: {treated}")
    low, high = np.where(is_narrow, least, low), np.where(is_narrow, most, high)
    return low, np.where(is_still, low, high), lines


def scale_states(columns: _Columns) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns low and high, float32 `[S]`, at least `MIN_STATE_WIDTH` apart, and a line on each that was widened.

    A widened range has the data in the middle of one of the prompt's 256 bins. A dimension that is always the same is
    left as it is.
    """
    low, high = columns["q01"], columns["q99"]
    is_narrow = (high - low < MIN_STATE_WIDTH) & (columns.get("max", high) > columns.get("min", low))
    lines = [
        f"state {i}: 98 % of its values lie within {high[i] - low[i]:.2g}: scaled as if they filled {MIN_STATE_WIDTH:g}"
        for i in np.flatnonzero(is_narrow)
    ]
    first = (0.5 * (low + high) - MIN_STATE_WIDTH * (128.5 / 256)).astype(np.float32)
    last = (first + MIN_STATE_WIDTH).astype(np.float32)
    return np.where(is_narrow, first, low), np.where(is_narrow, last, high), lines


def values_beyond(dataset: Dataset, stats: NormStats, *, has_mask: bool, has_state: bool) -> Beyond:
    """Compares demonstrations with statistics that may be another robot's.

    An action is cut off where scaling it and back gives another one by more than `MIN_ACTION_RANGE`: above and below
    the range, and everywhere but at the constant of a dimension that never moves.

    Args:
        dataset: the demonstrations; 2000 of their frames, evenly spread, are read.
        stats: the statistics.
        has_mask: whether the policy takes what the mask leaves out as it is, between -1 and 1, or scales that, too.
        has_state: whether the policy sees the state.
    """
    frames = imitation_frames(dataset)
    frames = frames[np.unique(np.linspace(0, len(frames) - 1, _NUM_FRAMES).astype(int))]
    records = [dataset.frame(int(index), with_images=False) for index in frames]
    action = np.stack([record["action"] for record in records])
    low, high = np.array(stats.action_q01), np.array(stats.action_q99)
    unit = np.where(high > low, to_quantiles(action, low, high), 0.0)
    if has_mask:
        passes = ~np.asarray(stats.action_mask) & (high > low)
        low, high = np.where(passes, -1.0, low), np.where(passes, 1.0, high)
    cut = np.abs(np.clip(action, low, high) - action) > MIN_ACTION_RANGE
    state_beyond = np.zeros(0)
    if has_state:
        state = np.stack([record["state"] for record in records])
        distance = np.maximum(stats.state_q01 - state, state - stats.state_q99)
        state_beyond = (distance > MIN_STATE_WIDTH).mean(axis=0)
    return Beyond(cut.mean(axis=0), state_beyond, np.abs(unit).max(axis=0))
