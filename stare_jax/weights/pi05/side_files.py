"""What a checkpoint of pi0.5 has beside its weights, kept in a converted folder so that the way back loses nothing.

<folder>/checkpoints/          our parameters
<folder>/openpi/               assets with norm_stats.json, and all other files that hold no weights
<folder>/openpi/record.json    the format, and the type of each tensor where they differ
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from stare_jax.weights.openvla.config import write_json
from stare_jax.weights.pi05.read import HEADS, Weights
from stare_jax.weights.pi05.statistics import ASSETS
from stare_jax.weights.safetensors_folder import INDEX, WEIGHT_SUFFIXES, read_json

KEPT, RECORD = "openpi", "record.json"
_MODEL = re.compile(r"model.*\.safetensors")
_ORBAX = {"params", "_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt", "orbax.checkpoint", "d"}
_ORBAX |= {"array_metadatas", "commit_success.txt"}
"""files and folders of the weights themselves."""


class Kept(NamedTuple):
    """What is known of the checkpoint that a converted folder was."""

    folder: Path
    form: str
    """see `pi05.Weights`."""
    dtypes: Mapping[str, str]
    """of each leaf or tensor; empty where all have the same, or another than the one they came in is wanted."""


def keep_aside(source: Path, weights: Weights, to: Path) -> list[str]:
    """Copies all of a checkpoint but its weights.

    Args:
        source: of the checkpoint; a file has nothing beside it.
        weights: what was found in it.
        to: a new folder.

    Returns:
        The names of what is left behind.
    """
    to.mkdir(parents=True)
    left = copy_side_files(source, to) if source.is_dir() else []
    dtypes = weights.dtypes if len(set(weights.dtypes.values())) > 1 else {}
    write_json(to / RECORD, {"form": weights.form, "dtypes": dtypes})
    return left


def open_kept(folder: Path) -> Kept | None:
    """Returns what a folder keeps of a checkpoint; None where it keeps nothing."""
    file = folder / KEPT / RECORD
    if not file.exists():
        return None
    record = read_json(file)
    return Kept(folder / KEPT, record["form"], record["dtypes"])


def copy_side_files(source: Path, to: Path) -> list[str]:
    """Copies the files of a folder that are not the model's weights; returns the names of others left behind.

    Small safetensors files that are not the model's, such as the statistics of lerobot's processors, come along.
    """
    left = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in (INDEX, HEADS, RECORD, *_ORBAX) or _MODEL.fullmatch(name) or name.startswith("ocdbt.process_"):
            continue
        if name == ASSETS and path.is_dir():
            copy_assets(source, to)
        elif path.is_file() and (path.suffix not in WEIGHT_SUFFIXES or path.suffix == ".safetensors"):
            shutil.copyfile(path, to / name)
        elif not name.startswith("."):
            left.append(name)
    return left


def copy_assets(source: Path, to: Path) -> None:
    """Copies the assets of a folder, where it has any."""
    if (source / ASSETS).is_dir():
        shutil.copytree(source / ASSETS, to / ASSETS)
