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

from stare_jax.config import check_name, read_json
from stare_jax.models.normalize import action_range
from stare_jax.types import Array, NormStats
from stare_jax.weights.files import WeightsError, update_json, write_json
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


def _read_quantiles(where: str, table: Mapping[str, Any], name: str, dim: int | None = None) -> tuple[Array, Array]:
    """Reads q01 and q99 of actions or states, as many numbers of each, float32, of which the first `dim` are returned.

    Raises:
        WeightsError: they are not there, null, no finite numbers, or fewer than asked for; begins with `where`.
    """
    fields = table.get(name)
    if not isinstance(fields, dict):
        raise WeightsError(f"{where}: got {sorted(table)}, expected {name!r} among them")
    quantiles = []
    for quantile in ("q01", "q99"):
        place, values = f"{where}.{name}.{quantile}", fields.get(quantile)
        if values is None:
            got = "null" if quantile in fields else "nothing"
            raise WeightsError(f"{place}: got {got}, expected numbers: policies are normalised by quantiles")
        try:
            values = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{place}: {error}, expected numbers") from error
        if values.ndim != 1 or not np.isfinite(values).all():
            raise WeightsError(f"{place}: got {values}, expected a list of finite numbers")
        if dim is not None and len(values) < dim:
            raise WeightsError(f"{place}: got {len(values)} numbers, expected {dim}")
        quantiles.append(values[:dim])
    low, high = quantiles
    if len(low) != len(high):
        got = f"{len(low)} and {len(high)} numbers in q01 and q99"
        raise WeightsError(f"{where}.{name}: got {got}, expected as many in both")
    return low, high


def read_openvla_tables(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns what OpenVLA's files say of all data sets, by name.

    dataset_statistics.json, which fine-tuned checkpoints carry, goes over config.json, and a later folder, such as that
    of an adapter, over an earlier one.
    """
    tables: dict[str, Any] = {}
    for folder in folders:
        tables |= read_json(folder / CONFIG, optional=True).get("norm_stats") or {}
        tables |= read_json(folder / _OPENVLA_FILE, optional=True)
    return tables


def read_openvla_stats(
    folders: Sequence[Path], unnorm_key: str | None = None, action_dim: int | None = None, state_dim: int | None = None
) -> tuple[str, NormStats]:
    """Reads name and statistics of one of OpenVLA's data sets, see `Format.statistics`; nothing is ever cut.

    Raises WeightsError where the name is missing or unknown, and for quantiles that are missing or no numbers.
    """
    tables = read_openvla_tables(folders)
    name = choose_name(tables, unnorm_key, folders[0])
    where, table = f"{folders[0]}: {name}", tables[name]
    low, _ = _read_quantiles(where, table, "action")
    mask = np.asarray(table["action"].get("mask", [True] * len(low)), bool)
    state = _read_quantiles(where, table, "proprio") if state_dim else _NO_NUMBERS
    return name, NormStats(*action_range(table["action"], mask), mask, *state)


def to_openvla_table(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as OpenVLA's files have them: quantiles and mask, which is all that a policy needs."""
    columns = {name: np.asarray(value).tolist() for name, value in stats._asdict().items()}
    table = {"action": {"q01": columns["action_q01"], "q99": columns["action_q99"], "mask": columns["action_mask"]}}
    if columns["state_q01"]:
        table["proprio"] = {"q01": columns["state_q01"], "q99": columns["state_q99"]}
    return table


def write_openvla_tables(to: Path, tables: Mapping[str, Any]) -> None:
    """Puts tables of data sets, by name, over those of a folder, in both places where they are looked for."""
    update_json(to / _OPENVLA_FILE, tables)
    if (to / CONFIG).exists():
        known = read_json(to / CONFIG).get("norm_stats") or {}
        update_json(to / CONFIG, {"norm_stats": {**known, **tables}})


def list_assets(folder: Path) -> dict[str, Path]:
    """Returns openpi's files of statistics in a checkpoint, by asset id, which may have slashes in it."""
    assets = folder / ASSETS
    return {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.rglob(_OPENPI_FILE))}


def read_asset(
    folders: Sequence[Path], unnorm_key: str | None = None, action_dim: int | None = None, state_dim: int | None = None
) -> tuple[str, NormStats] | tuple[None, None]:
    """Reads asset id and statistics of openpi's in the first folder, see `Format.statistics` and `read_openpi_stats`.

    Raises WeightsError where the name is missing or unknown; without a name there may be none at all.
    """
    assets = list_assets(folders[0])
    if unnorm_key is None and not assets:
        return None, None
    asset_id = choose_name(assets, unnorm_key, folders[0])
    return asset_id, read_openpi_stats(assets[asset_id], action_dim=action_dim, state_dim=state_dim)


def read_openpi_stats(file: Path, *, action_dim: int | None = None, state_dim: int | None = None) -> NormStats:
    """Reads the quantiles of actions and states from norm_stats.json.

    Longer ones are cut to A and S, `action_dim` and `state_dim`, as openpi does; None takes all that there are. Raises
    WeightsError where there are fewer, or quantiles are missing or no numbers.
    """
    where, stats = f"{file}: norm_stats", read_json(file).get("norm_stats")
    if not isinstance(stats, dict):
        raise WeightsError(f"{file}: got no norm_stats, expected those of state and actions")
    low, high = (values[:_MAX_DIM] for values in _read_quantiles(where, stats, "actions", action_dim))
    has_state = state_dim > 0 if state_dim is not None else "state" in stats
    state = _read_quantiles(where, stats, "state", state_dim) if has_state else _NO_NUMBERS
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


def check_asset(asset_id: str) -> str:
    """Returns an asset id, the names of folders with slashes between; ConfigError for one that leaves `assets`."""
    return "/".join(check_name(name, f"stats_name {asset_id!r}") for name in asset_id.split("/"))


def write_openpi_stats(to: Path, asset_id: str, stats: NormStats) -> None:
    """Writes `assets/<asset id>/norm_stats.json` into a folder."""
    file = to / ASSETS / asset_id / _OPENPI_FILE
    file.parent.mkdir(parents=True)
    write_json(file, to_openpi_stats(stats))
