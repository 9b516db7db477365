"""What a checkpoint has beside the weights that we train: tensors that are never run, JSON files, the tokenizer.

A converted folder keeps it, byte for byte, so that the way back loses nothing:

    <folder>/checkpoints/                  our parameters
    <folder>/huggingface/                  config.json, tokenizer, statistics, preprocessor ...
    <folder>/huggingface/unused.safetensors
    <folder>/huggingface/adapter/          the same of a PEFT adapter, where there is one
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.openvla.config import read_config
from stare_jax.weights.openvla.read import VALUE_HEAD, open_checkpoint
from stare_jax.weights.openvla.table import unused_specs
from stare_jax.weights.safetensors_folder import (
    INDEX,
    WEIGHT_SUFFIXES,
    Stored,
    Tensors,
    check_tensors,
    list_file,
    read,
    write_file,
)

KEPT, UNUSED, ADAPTER = "huggingface", "unused.safetensors", "adapter"
ADAPTER_MODEL = "adapter_model.safetensors"
_TAKEN = (UNUSED, VALUE_HEAD, ADAPTER_MODEL)
"""weights that are read by name."""


class Base(NamedTuple):
    """The checkpoint that a policy came from."""

    folder: Path
    """of its JSON files."""
    config: OpenVLAConfig
    tensors: dict[str, Stored]
    """of what our parameters hold; empty for a converted folder, where they are parameters already."""
    unused: dict[str, Stored]
    """of what is never run."""


def open_base(folder: Path) -> Base:
    """Opens a checkpoint in Hugging Face's format, or what a converted folder keeps of one.

    Raises:
        WeightsError: it is damaged or does not fit its own config.json.
    """
    if not (folder / KEPT).is_dir():
        config = read_config(folder)
        checkpoint = open_checkpoint(folder, config)
        return Base(folder, config, checkpoint.tensors, checkpoint.unused)
    kept = folder / KEPT
    config, unused = read_config(kept), list_file(kept / UNUSED)
    dtype = next((stored.spec.dtype for stored in unused.values()), config.execution.param_dtype)
    check_tensors(kept / UNUSED, unused, unused_specs(config, dtype))
    return Base(kept, config, {}, unused)


def keep_aside(source: Path, unused: Tensors, to: Path) -> list[str]:
    """Copies all of a folder but its weights, and those of its tensors that are never run.

    Args:
        source: of a checkpoint or an adapter.
        unused: of its tensors.
        to: a new folder.

    Returns:
        The names of what is left behind.
    """
    to.mkdir(parents=True)
    specs = {name: stored.spec for name, stored in unused.items()}
    write_file(to / UNUSED, specs, ((name, read(stored)) for name, stored in unused.items()))
    return copy_side_files(source, to)


def copy_side_files(source: Path, to: Path, *, skip: Collection[str] = ()) -> list[str]:
    """Copies the files of a folder that hold no weights; returns the names of others, and of folders, left behind.

    Args:
        source: of a checkpoint or an adapter, or what was kept of one.
        to: a folder.
        skip: names of files to pass over.
    """
    left = []
    for path in sorted(source.iterdir()):
        if path.name in (INDEX, *_TAKEN, *skip) or re.fullmatch(r"model.*\.safetensors", path.name):
            continue
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, to / path.name)
        elif path.name != ADAPTER and not path.name.startswith("."):
            left.append(path.name)
    return left
