"""Parts of an evaluation, and the folder that holds the results of finished parts until the whole is finished."""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stare_jax.evaluate.episodes import Episodes
from stare_jax.evaluate.films import Film
from stare_jax.logging import replace_bytes
from stare_jax.types import Array, Signals

NUM_PARTS = 10
"""Number of parts, if the evaluation has so many whole batches of environments."""
_RESULTS_FILE = "episodes.npz"


class PartsDone(NamedTuple):
    """Results of the first parts of an evaluation."""

    num_parts: int
    episodes: Episodes | None
    """All episodes of these parts; None where no part is finished."""
    initial: Array | None
    """float32 `[E, 22]`, their initial states."""
    num_steps: int
    """Actions executed, those of lost episodes included."""
    wall_s: float
    films: tuple[Film, ...]


NOTHING_DONE = PartsDone(0, None, None, 0, 0.0, ())


def split_into_parts(num_episodes: int, num_envs: int) -> list[range]:
    """Returns the indices of the episodes of each part: whole batches of environments, a tenth of all or one batch."""
    batches = max(1, round(num_episodes / NUM_PARTS / num_envs))
    size = batches * num_envs
    return [range(first, min(first + size, num_episodes)) for first in range(0, num_episodes, size)]


def save_parts(folder: Path, identity: Mapping[str, Any], done: PartsDone) -> None:
    """Writes the results so far; at any moment the folder holds those of this call or those of the call before.

    Args:
        folder: the folder to write into; it is made if it does not exist.
        identity: JSON values on which the results depend.
        done: at least one part.
    """
    # Films come first, and none is written twice, so that every film that the results name is there.
    for film in done.films:
        if not (file := _film_file(folder, film.episode)).exists():
            frames = {} if film.frames is None else {"frames": film.frames}
            _write(file, {"valid": film.valid} | film.signals._asdict() | frames)
    numbers = {"num_parts": done.num_parts, "num_steps": done.num_steps, "wall_s": done.wall_s}
    films = np.array([film.episode for film in done.films], np.int64)
    header = {"identity": json.dumps(identity), "films": films, "initial": done.initial}
    _write(folder / _RESULTS_FILE, numbers | header | done.episodes._asdict())
    _delete_other_films(folder, [film.episode for film in done.films])


def load_parts(folder: Path, identity: Mapping[str, Any]) -> PartsDone:
    """Returns the results in a folder, or `NOTHING_DONE` if it has none or those of another identity.

    Args:
        folder: a folder of `save_parts`; results of another identity are deleted.
        identity: JSON values that have to be equal to those that were saved.
    """
    if not (folder / _RESULTS_FILE).exists():
        delete_parts(folder)  # It may hold films that were written before the process was killed.
        return NOTHING_DONE
    found = _read(folder / _RESULTS_FILE)
    if json.loads(str(found["identity"])) != json.loads(json.dumps(identity)):
        delete_parts(folder)
        return NOTHING_DONE
    _delete_other_films(folder, found["films"].tolist())
    films = []
    for episode in found["films"].tolist():
        leaves = _read(_film_file(folder, episode))
        signals = Signals(*(leaves[name] for name in Signals._fields))
        films.append(Film(episode, signals, leaves["valid"], leaves.get("frames")))
    return PartsDone(
        num_parts=int(found["num_parts"]),
        episodes=Episodes(*(found[name] for name in Episodes._fields)),
        initial=found["initial"],
        num_steps=int(found["num_steps"]),
        wall_s=float(found["wall_s"]),
        films=tuple(films),
    )


def delete_parts(folder: Path) -> None:
    """Deletes the folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _delete_other_films(folder: Path, episodes: Sequence[int]) -> None:
    """Deletes films that the results do not name: the process was killed after it had written them."""
    for file in set(folder.glob("film_*.npz")) - {_film_file(folder, episode) for episode in episodes}:
        file.unlink()


def _film_file(folder: Path, episode: int) -> Path:
    return folder / f"film_{episode}.npz"


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_bytes(file, content.getvalue())


def _read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
