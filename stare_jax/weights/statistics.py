"""Statistics of data sets in checkpoints of others, in and out: OpenVLA's layout and openpi's.

    OpenVLA: {<data set>: {"action": {"q01": [..], "q99": [..], "mask": [..]}, "proprio": {..}}}
             in dataset_statistics.json, and under "norm_stats" in config.json
    openpi:  {"norm_stats": {"state": {"q01": [..], "q99": [..], ..}, "actions": {..}}} in assets/<asset id>

openpi has no dimension that passes through unnormalised, and needs means and deviations, which pi0.5 does not use.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.models.normalize import action_range
from stare_jax.types import NormStats
from stare_jax.weights.files import WeightsError, read_json, write_json
from stare_jax.weights.side_files import ASSETS, CONFIG

_OPENVLA_FILE, _OPENPI_FILE = "dataset_statistics.json", "norm_stats.json"
_MAX_DIM = 32
"""numbers of an action in pi0.5's published networks, to which statistics may be padded"""
_NORMAL_Q99 = 2.3263
"""standard deviations between the mean of a normal distribution and its 0.99 quantile"""
_NO_NUMBERS = (np.zeros(0, np.float32), np.zeros(0, np.float32))


def choose_name(names: Sequence[str], name: str | None, folder: Path) -> str:
    """Returns the name of the data set to take; raises WeightsError unless it is there, or is the only one."""
    if name is None and len(names) == 1:
        (name,) = names
    if name not in names:
        raise WeightsError(f"unnorm_key: got {name!r}, expected one of {sorted(names)} for {folder}")
    return name


def _read_quantiles(where: str, fields: Mapping[str, Any], dim: int | None, why: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads q01 and q99, as many numbers of each, float32, of which the first `dim` are returned."""
    quantiles = []
    for quantile in ("q01", "q99"):
        values = fields.get(quantile)
        if values is None:
            got = "null" if quantile in fields else "nothing"
            raise WeightsError(f"{where}.{quantile}: got {got}, expected numbers: {why}")
        try:
            values = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{where}.{quantile}: {error}, expected numbers") from error
        if values.ndim != 1 or not np.isfinite(values).all():
            raise WeightsError(f"{where}.{quantile}: got {values}, expected a list of finite numbers")
        if dim is not None and len(values) < dim:
            raise WeightsError(f"{where}.{quantile}: got {len(values)} numbers, expected {dim}")
        quantiles.append(values[:dim])
    low, high = quantiles
    if len(low) != len(high):
        got = f"{len(low)} and {len(high)}"
        raise WeightsError(f"{where}: got {got} numbers in q01 and q99, expected as many in both")
    return low, high


def read_openvla_tables(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns what OpenVLA's files say of all data sets, by name.

    dataset_statistics.json, which fine-tuned checkpoints carry, goes over config.json, and a later folder, such as that
    of an adapter, over an earlier one.
    """
    tables: dict[str, Any] = {}
    for folder in folders:
        if (folder / CONFIG).exists():
            tables |= read_json(folder / CONFIG).get("norm_stats") or {}
        if (folder / _OPENVLA_FILE).exists():
            tables |= read_json(folder / _OPENVLA_FILE)
    return tables


def read_openvla_stats(
    folders: Sequence[Path], unnorm_key: str | None = None, action_dim: int | None = None, state_dim: int | None = None
) -> tuple[str, NormStats]:
    """Reads name and statistics of one of OpenVLA's data sets, see `Format.statistics`; nothing is ever cut.

    Raises:
        WeightsError: see `choose_name`; also where quantiles are missing or are no numbers.
    """
    tables = read_openvla_tables(folders)
    name = choose_name(tables, unnorm_key, folders[0])
    where, why = f"{folders[0]}: statistics of {name!r}", "OpenVLA is normalised by quantiles"
    try:
        action = tables[name]["action"]
        proprio = tables[name]["proprio"] if state_dim else None
    except KeyError as error:
        raise WeightsError(f"{where}: got no {error}, expected them") from error
    low, _ = _read_quantiles(f"{where}: action", action, None, why)
    mask = np.asarray(action.get("mask", [True] * len(low)), bool)
    state = _NO_NUMBERS if proprio is None else _read_quantiles(f"{where}: proprio", proprio, None, why)
    return name, NormStats(*action_range(action, mask), mask, *state)


def to_openvla_table(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as OpenVLA's files have them: quantiles and mask, which is all that a policy needs."""
    columns = {name: np.asarray(value).tolist() for name, value in stats._asdict().items()}
    table = {"action": {"q01": columns["action_q01"], "q99": columns["action_q99"], "mask": columns["action_mask"]}}
    if columns["state_q01"]:
        table["proprio"] = {"q01": columns["state_q01"], "q99": columns["state_q99"]}
    return table


def write_openvla_tables(to: Path, tables: Mapping[str, Any]) -> None:
    """Puts tables of data sets, by name, over those of a folder, in both places where they are looked for."""
    side = read_json(to / _OPENVLA_FILE) if (to / _OPENVLA_FILE).exists() else {}
    write_json(to / _OPENVLA_FILE, {**side, **tables})
    if (to / CONFIG).exists():
        description = read_json(to / CONFIG)
        description["norm_stats"] = {**(description.get("norm_stats") or {}), **tables}
        write_json(to / CONFIG, description)


def list_assets(folder: Path) -> dict[str, Path]:
    """Returns openpi's files of statistics in a checkpoint, by asset id, which may have slashes in it."""
    assets = folder / ASSETS
    return {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.rglob(_OPENPI_FILE))}


def find_stats(folder: Path, asset_id: str | None) -> tuple[str, Path] | None:
    """Returns asset id and file of openpi's statistics, see `choose_name`; None where none are there, nor named."""
    assets = list_assets(folder)
    if asset_id is None and not assets:
        return None
    asset_id = choose_name(assets, asset_id, folder)
    return asset_id, assets[asset_id]


def read_asset(
    folders: Sequence[Path], unnorm_key: str | None, action_dim: int | None, state_dim: int | None
) -> tuple[str | None, NormStats | None]:
    """Reads asset id and statistics of openpi's in the first folder, see `find_stats` and `read_openpi_stats`."""
    found = find_stats(folders[0], unnorm_key)
    if found is None:
        return None, None
    return found[0], read_openpi_stats(found[1], action_dim=action_dim, state_dim=state_dim)


def read_openpi_stats(
    file: Path, *, max_dim: int = _MAX_DIM, action_dim: int | None = None, state_dim: int | None = None
) -> NormStats:
    """Reads the quantiles of actions and states from norm_stats.json.

    Statistics may be padded to `max_dim` numbers; longer ones are cut to A and S, `action_dim` and `state_dim`, as
    openpi does. None takes all that there are.

    Raises:
        WeightsError: quantiles are missing or null, or there are fewer than asked for.
    """
    content = read_json(file)
    stats = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(stats, dict):
        raise WeightsError(f"{file}: got no norm_stats, expected those of state and actions")

    def quantiles(name: str, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(stats.get(name), dict):
            raise WeightsError(f"{file}: norm_stats: got {sorted(stats)}, expected {name!r} among them")
        why = "pi0.5 is normalised by quantiles, which openpi's compute_norm_stats.py writes"
        return _read_quantiles(f"{file}: norm_stats.{name}", stats[name], dim, why)

    low, high = (values[:max_dim] for values in quantiles("actions", action_dim))
    has_state = state_dim > 0 if state_dim is not None else "state" in stats
    state = quantiles("state", state_dim) if has_state else _NO_NUMBERS
    return NormStats(low, high, np.ones(len(low), bool), *state)


def to_openpi_stats(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as openpi reads them.

    An action dimension that passes through has the quantiles -1 and 1, under which it is its own normalised value.
    Means and deviations are those of a normal distribution with these quantiles.
    """
    mask = np.asarray(stats.action_mask)
    low, high = np.where(mask, stats.action_q01, -1.0), np.where(mask, stats.action_q99, 1.0)
    fields = {"actions": _to_fields(low, high)}
    if len(stats.state_q01):
        fields["state"] = _to_fields(stats.state_q01, stats.state_q99)
    return {"norm_stats": fields, "note": "mean and std are estimated from the quantiles, as of normal distributions"}


def _to_fields(low: Any, high: Any) -> dict[str, list[float]]:
    # Through float32's shortest decimal form, so that files read well and give the same float32 back.
    low, high = (np.asarray(values, np.float32) for values in (low, high))
    columns = {"mean": (low + high) / 2, "std": (high - low) / np.float32(2 * _NORMAL_Q99), "q01": low, "q99": high}
    return {name: [float(str(value)) for value in values] for name, values in columns.items()}


def write_openpi_stats(to: Path, asset_id: str, stats: NormStats) -> None:
    """Writes `assets/<asset id>/norm_stats.json` into a folder."""
    file = to / ASSETS / asset_id / _OPENPI_FILE
    file.parent.mkdir(parents=True)
    write_json(file, to_openpi_stats(stats))
