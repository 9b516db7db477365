"""Scores of a reference policy, kept beside the pairs that it scored, so that they are computed once.

<directory>/tpo/reference/<side>.npz    scores of the chosen, or the rejected, side of all pairs
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from stare_jax.data.arrays import read_arrays, write_arrays
from stare_jax.sharding import pod
from stare_jax.types import PyTree

FOLDER = "tpo/reference"
Keep = Callable[[str, PyTree, Callable[[], np.ndarray]], np.ndarray]
"""keep(name, inputs, compute) -> scores: those of `compute()`, which is not called where they are there already."""


def keep_scores(directory: str | Path, source: str) -> Keep:
    """Returns a function that computes scores once, and from then on reads them.

    Scores of other parameters or other inputs are computed anew. The function raises ArraysError where a file is
    damaged.

    Args:
        directory: the run directory.
        source: name of the parameters and of the way in which they score, no others have it; "" keeps nothing.
    """

    def keep(name: str, inputs: PyTree, compute: Callable[[], np.ndarray]) -> np.ndarray:
        if not source:
            return compute()
        file = Path(directory) / FOLDER / f"{name}.npz"
        identity = json.dumps({"source": source, "inputs": fingerprint_arrays(inputs)})
        scores = pod.on_main(_read, file, identity)
        if scores is None:
            scores = compute()
            pod.on_main(write_arrays, file, {"identity": identity, "scores": scores})
        return scores

    return keep


def _read(file: Path, identity: str) -> np.ndarray | None:
    """Returns the scores in a file; None where it is not there, or has those of something else."""
    if not file.exists():
        return None
    about = {"expected": "scores of a reference policy", "advice": "delete it to have them computed again"}
    kept = read_arrays(file, "identity", "scores", **about)
    return kept["scores"] if str(kept["identity"]) == identity else None


def fingerprint_arrays(tree: PyTree) -> str:
    """Returns 12 hexadecimal digits of the values of all NumPy leaves of a tree, with their shapes and types."""
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        if leaf.size:
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:12]
