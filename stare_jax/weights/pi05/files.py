"""Whether a folder or a file holds weights of pi0.5 in the formats of others, told by what is in it."""

from pathlib import Path

from stare_jax.weights.pi05.npz import is_npz
from stare_jax.weights.pi05.port import is_port
from stare_jax.weights.safetensors_folder import INDEX, Tensors, list_file, list_model

_TREE = "_METADATA"
"""file of Orbax's that says what is in a tree."""


def tree_folder(source: Path) -> Path | None:
    """Returns where a folder has an Orbax tree on its own; None where it has none."""
    return next((folder for folder in (source / "params", source) if (folder / _TREE).is_file()), None)


def list_tensors(source: Path) -> Tensors | None:
    """Returns what safetensors there are in a folder or file; None where there are none.

    Raises:
        WeightsError: they are damaged.
    """
    if source.is_file():
        return list_file(source)
    return list_model(source) if (source / INDEX).exists() or any(source.glob("model*.safetensors")) else None


def holds_pi05(source: Path) -> bool:
    """Returns whether a folder or file holds weights of pi0.5, or pi0, or PaliGemma, in the formats of others.

    Raises:
        WeightsError: it holds safetensors, and they are damaged.
    """
    if is_npz(source):
        return True
    tensors = list_tensors(source)
    return tree_folder(source) is not None if tensors is None else is_port(tensors)
