"""Statistics of data sets in checkpoints of others, in and out: OpenVLA's layout and openpi's.

    OpenVLA: {<data set>: {"action": {"q01": [..], "q99": [..], "mask": [..]}, "proprio": {..}}}
             in dataset_statistics.json, and under "norm_stats" in config.json
    openpi:  {"norm_stats": {"state": {"q01": [..], "q99": [..], ..}, "actions": {..}}} in assets/<asset id>

openpi has no dimension that passes through unnormalised, and needs means and deviations, which pi0.5 does not use.
What is written gives the policy's own actions when it is put into the other program's formula.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stare_jax.documents import check_record, read_json
from stare_jax.documents.openvla import STATISTICS, read_tables
from stare_jax.documents.reader import NOTHING
from stare_jax.documents.statistics import check_quantiles
from stare_jax.models.normalize import action_range, is_constant_action
from stare_jax.types import NormStats
from stare_jax.weights.files import WeightsError, update_json, write_json
from stare_jax.weights.side_files import ASSETS, CONFIG

_OPENPI_FILE = "norm_stats.json"
_MAX_DIM = 32
"""numbers of an action in pi0.5's published networks, to which statistics may be padded"""
_NORMAL_Q99 = 2.3263
"""standard deviations between the mean of a normal distribution and its 0.99 quantile"""
_NO_NUMBERS = {"q01": np.zeros(0, np.float32), "q99": np.zeros(0, np.float32)}


class _OpenpiFile(NamedTuple):
    """norm_stats.json of openpi."""

    norm_stats: dict[str, Any]


def choose_name(names: Sequence[str], name: str | None, folder: Path) -> str:
    """Returns the name of the data set to take; raises WeightsError unless it is there, or is the only one."""
    if name is None and len(names) == 1:
        (name,) = names
    if name not in names:
        raise WeightsError(f"unnorm_key: got {name!r}, expected one of {sorted(names)} for {folder}")
    return name


def read_openvla_tables(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the tables that OpenVLA's files have of all data sets, by name, see `read_tables`."""
    return {name: table.fields for name, table in read_tables(folders).items()}


def read_openvla_stats(
    folders: Sequence[Path], unnorm_key: str | None = None, action_dim: int | None = None, state_dim: int | None = None
) -> tuple[str, NormStats]:
    """Reads name and statistics of one of OpenVLA's data sets, see `Format.statistics`; nothing is ever cut.

    Raises:
        WeightsError: the name is missing or unknown.
        DocumentError: statistics are missing or damaged, see `check_quantiles`.
    """
    tables, state = read_tables(folders), _NO_NUMBERS
    name = choose_name(tables, unnorm_key, folders[0])
    file, path, fields = tables[name]
    action = check_quantiles(fields.get("action", NOTHING), file, f"{path}.action")
    if state_dim:
        state = check_quantiles(fields.get("proprio", NOTHING), file, f"{path}.proprio")
    return name, NormStats(*action_range(action, action["mask"]), action["mask"], state["q01"], state["q99"])


def to_openvla_table(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as OpenVLA's files have them: quantiles and mask, which is all that a policy needs.

    A dimension that never moves has mask True: its value is q01 there, whatever token OpenVLA generates for it.
    """
    columns = {name: np.asarray(value).tolist() for name, value in stats._asdict().items()}
    mask = (np.asarray(stats.action_mask) | is_constant_action(stats)).tolist()
    table = {"action": {"q01": columns["action_q01"], "q99": columns["action_q99"], "mask": mask}}
    if columns["state_q01"]:
        table["proprio"] = {"q01": columns["state_q01"], "q99": columns["state_q99"]}
    return table


def write_openvla_tables(to: Path, tables: Mapping[str, Any]) -> None:
    """Puts tables of data sets, by name, over those of a folder, in both places where they are looked for."""
    update_json(to / STATISTICS, tables)
    if (to / CONFIG).exists():
        known = read_json(to / CONFIG).get("norm_stats") or {}
        update_json(to / CONFIG, {"norm_stats": {**known, **tables}})


def list_assets(folder: Path) -> dict[str, Path]:
    """Returns openpi's files of statistics in a checkpoint, by asset id, which may have slashes in it."""
    assets = folder / ASSETS
    found = sorted(Path(place) for place, _, names in os.walk(assets, followlinks=True) if _OPENPI_FILE in names)
    return {path.relative_to(assets).as_posix(): path / _OPENPI_FILE for path in found}


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
    DocumentError where there are fewer, or quantiles are missing or damaged, see `check_quantiles`.
    """
    stats, place = check_record(_OpenpiFile, read_json(file), str(file)).norm_stats, str(file)
    action = check_quantiles(
        stats.get("actions", NOTHING), place, "norm_stats.actions", dim=action_dim, may_be_longer=True
    )
    low, high = action["q01"][:_MAX_DIM], action["q99"][:_MAX_DIM]
    has_state = state_dim > 0 if state_dim is not None else "state" in stats
    state = _NO_NUMBERS
    if has_state:
        state = check_quantiles(
            stats.get("state", NOTHING), place, "norm_stats.state", dim=state_dim, may_be_longer=True
        )
    return NormStats(low, high, np.ones(len(low), bool), state["q01"], state["q99"])


def to_openpi_stats(stats: NormStats) -> dict[str, Any]:
    """Returns statistics as openpi reads them.

    pi0.5 scales every action dimension by its quantiles, whatever the mask, and so do these. Means and deviations are
    those of a normal distribution with these quantiles.
    """
    fields = {"actions": _to_fields(stats.action_q01, stats.action_q99)}
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
