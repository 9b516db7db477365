"""norm_stats.json of openpi's checkpoints, in and out: `assets/<asset id>/norm_stats.json`.

    {"norm_stats": {"state": {"mean": [..], "std": [..], "q01": [..], "q99": [..]}, "actions": {..}}}

pi0.5 is normalised by quantiles, so these are what is read. openpi has no dimension that passes through unnormalised.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.types import NormStats
from stare_jax.weights.safetensors_folder import WeightsError, read_json
from stare_jax.weights.side_files import ASSETS, write_json

STATS = "norm_stats.json"
_NORMAL_Q99 = 2.3263
"""standard deviations between the mean of a normal distribution and its 0.99 quantile."""


def list_assets(folder: Path) -> dict[str, Path]:
    """Returns the files of statistics of a checkpoint, by asset id, which may have slashes in it."""
    assets = folder / ASSETS
    return {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.rglob(STATS))}


def find_stats(folder: Path, asset_id: str | None) -> tuple[str, Path] | None:
    """Returns asset id and file of a checkpoint's statistics; None where it has none and none are asked for.

    Args:
        folder: of the checkpoint.
        asset_id: which; may be left out where there is only one.

    Raises:
        WeightsError: they are not there, or are not named although there are several.
    """
    assets = list_assets(folder)
    if asset_id is None and not assets:
        return None
    if asset_id is None and len(assets) == 1:
        (asset_id,) = assets
    if asset_id not in assets:
        raise WeightsError(f"unnorm_key: got {asset_id!r}, expected one of {sorted(assets)} for {folder}")
    return asset_id, assets[asset_id]


def read_openpi_stats(
    file: Path, *, max_dim: int, action_dim: int | None = None, state_dim: int | None = None
) -> NormStats:
    """Reads the quantiles of actions and states.

    Args:
        file: norm_stats.json.
        max_dim: of an action in the network. Statistics may be padded to it.
        action_dim: A, to which longer statistics are cut, as openpi does; None takes them all.
        state_dim: S, likewise; None takes none where there are none.

    Raises:
        WeightsError: quantiles are missing or null, or there are fewer than asked for.
    """
    content = read_json(file)
    stats = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(stats, dict):
        raise WeightsError(f"{file}: got no norm_stats, expected those of state and actions")
    low, high = _quantiles(file, stats, "actions", action_dim)
    low, high = low[:max_dim], high[:max_dim]
    has_state = state_dim > 0 if state_dim is not None else "state" in stats
    state = _quantiles(file, stats, "state", state_dim) if has_state else (np.zeros(0, np.float32),) * 2
    return NormStats(low, high, np.ones(len(low), bool), *state)


def _quantiles(file: Path, stats: Mapping[str, Any], name: str, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
    fields = stats.get(name)
    if not isinstance(fields, dict):
        raise WeightsError(f"{file}: norm_stats: got {sorted(stats)}, expected {name!r} among them")
    quantiles = []
    for quantile in ("q01", "q99"):
        values = fields.get(quantile)
        if values is None:
            raise WeightsError(
                f"{file}: norm_stats.{name}.{quantile}: got {'null' if quantile in fields else 'nothing'}, expected "
                "numbers: pi0.5 is normalised by quantiles, which openpi's compute_norm_stats.py writes"
            )
        try:
            values = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{file}: norm_stats.{name}.{quantile}: {error}, expected numbers") from error
        if values.ndim != 1 or not np.isfinite(values).all():
            raise WeightsError(f"{file}: norm_stats.{name}.{quantile}: got {values}, expected a list of finite numbers")
        if dim is not None and len(values) < dim:
            raise WeightsError(f"{file}: norm_stats.{name}.{quantile}: got {len(values)} numbers, expected {dim}")
        quantiles.append(values[:dim])
    if len(quantiles[0]) != len(quantiles[1]):
        sizes = " and ".join(str(len(values)) for values in quantiles)
        raise WeightsError(f"{file}: norm_stats.{name}: got {sizes} numbers in q01 and q99, expected as many in both")
    return quantiles[0], quantiles[1]


def to_openpi_stats(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as openpi reads them.

    An action dimension that passes through has the quantiles -1 and 1, under which it is its own normalised value.
    Means and deviations, which openpi requires and pi0.5 does not use, are those of a normal distribution with these
    quantiles.
    """
    mask = np.asarray(stats.action_mask)
    low, high = np.where(mask, stats.action_q01, -1.0), np.where(mask, stats.action_q99, 1.0)
    note = "mean and std are estimated from the quantiles, as of normal distributions"
    fields = {"actions": _fields(low, high)}
    if len(stats.state_q01):
        fields["state"] = _fields(stats.state_q01, stats.state_q99)
    return {"norm_stats": fields, "note": note}


def _fields(low: Any, high: Any) -> dict[str, list[float]]:
    # Through float32's shortest decimal form, so that files read well and give the same float32 back.
    low, high = (np.asarray(values, np.float32) for values in (low, high))
    columns = {"mean": (low + high) / 2, "std": (high - low) / np.float32(2 * _NORMAL_Q99), "q01": low, "q99": high}
    return {name: [float(str(value)) for value in values] for name, values in columns.items()}


def write_stats(to: Path, asset_id: str, stats: NormStats) -> None:
    """Writes `assets/<asset id>/norm_stats.json` into a folder."""
    file = to / ASSETS / asset_id / STATS
    file.parent.mkdir(parents=True)
    write_json(file, to_openpi_stats(stats))
