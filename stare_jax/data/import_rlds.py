"""Imports demonstrations of real robots, Bridge V2 or Open X-Embodiment, from RLDS into the library's own store.

Episodes are stored one by one, without signals, so memory does not grow. The manifest counts what has been read, and a
second call goes on from there.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from stare_jax.config import Count, check_fields
from stare_jax.data.norm_stats import clear_statistics, renew_statistics
from stare_jax.data.reader import Dataset
from stare_jax.data.rlds_layouts import LAYOUTS, Layout
from stare_jax.data.rlds_source import (
    RESIZE,
    EpisodeSteps,
    RldsSource,
    check_files,
    check_source,
    list_fields,
    name_episode,
    read_episodes,
)
from stare_jax.data.schema import DatasetError
from stare_jax.data.writer import DatasetWriter, Kind
from stare_jax.logging import Interrupted, progress, say
from stare_jax.types import Observation, Trajectory

IDLE_FILTERS: Mapping[str, Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {"none": {}, "no_noops": {"idle": {"translation": 1e-4, "rotation": 1e-4}}}
)
"""name -> `Manifest.filters`: "none" imitates every action, as OpenVLA does by default; "no_noops" leaves out actions
that move the arm by less than 0.1 mm and 0.1 mrad and do not move the gripper, as OpenVLA does with its LIBERO data."""
IdleFilter = Literal[*IDLE_FILTERS]
NO_INSTRUCTION, TOO_SHORT, BROKEN = "without instruction", "too short", "broken"
"""Reasons for which an episode is dropped."""
NUM_NAMED = 5
"""Number of broken episodes that are named; all are counted."""


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """The part of a data set that is imported, and its form."""

    split: str = "train"
    image_size: Count = 224
    """Pixels of an image's side; images of any shape become squares."""
    camera: str = "3rd_view_camera"
    """Name under which the images are stored, and policies find them: that of the simulated WidowX's camera."""
    idle_filter: IdleFilter = "none"
    """Name in `IDLE_FILTERS`; the shards hold all actions, readers leave some out."""
    limit: Count | None = None
    """Number of episodes of the split to read at most; None reads all."""
    skip_broken: bool = False
    """True leaves out, names and counts episodes that cannot be read, are not what the layout says, or have a value
    that is not finite, instead of raising."""
    write_every: Count = 256
    """Number of episodes read between two writes; a killed process loses no more."""

    def __post_init__(self):
        check_fields(self)


def known_layout(source: RldsSource, name: str) -> Layout:
    """Returns the layout that data sets of a name have.

    Raises:
        DatasetError: the name is not known; the message lists the fields there are.
    """
    if name not in LAYOUTS:
        raise DatasetError(
            f"{source.directory}: got data set {name!r} with steps of {list_fields(source)}; expected one of "
            f"{', '.join(LAYOUTS)}, or to be told which of these fields are image and action"
        )
    return LAYOUTS[name]


def import_rlds(
    source: RldsSource,
    directory: str | os.PathLike,
    layout: Layout,
    config: ImportConfig,
    *,
    name: str,
    should_stop: Callable[[], bool] | None = None,
) -> Dataset:
    """Imports a data set, or goes on with an import that was interrupted, and writes its statistics.

    With a larger limit a data set grows. Statistics are of all actions but those that the idle filter leaves out.

    Args:
        source: the data set to read; see `open_source`.
        directory: folder of the data set that is written.
        layout: layout of the source.
        config: the part that is imported.
        name: name of the data set in the manifest, as `env_id`, and in `norm_stats.json`.
        should_stop: polled after every episode.

    Raises:
        Interrupted: `should_stop` said so; what was read is safe, and calling again goes on.
        DatasetError: a field or the split is missing; an episode is broken (`ImportConfig.skip_broken`); nothing is
            left to imitate; or the folder holds something else.
    """
    check_source(source, layout, config.split)
    directory, num_wanted = Path(directory), source.num_episodes[config.split]
    num_wanted = num_wanted if config.limit is None else min(num_wanted, config.limit)
    kind = _kind(source, layout, config, name)
    with DatasetWriter(
        directory,
        env_id=kind.env_id,
        control_mode=kind.control_mode,
        settings=kind.settings,
        filters=kind.filters,
        episodes_per_shard=None,
    ) as writer:
        Dataset(directory, verify=False)  # A shard that is gone is found before hours of reading, not after.
        if (num_read := _num_read(writer)) < num_wanted:
            check_files(source, config.split, num_read, num_wanted, may_miss=config.skip_broken)
            # Statistics are those of a complete data set, or absent.
            clear_statistics(directory, name)
            _fill(writer, source, layout, config, num_wanted, should_stop)
    dataset = Dataset(directory, verify=False)
    if not dataset.num_episodes:
        raise DatasetError(f"{source.directory}: no episode is left to imitate: {dataset.manifest.progress}")
    renew_statistics(dataset)
    return dataset


def _kind(source: RldsSource, layout: Layout, config: ImportConfig, name: str) -> Kind:
    """Returns the fields of the manifest that all of an import has in common."""
    settings = {
        "source": "rlds",
        "dataset": source.name,
        "version": source.version,
        "split": config.split,
        "image": layout.image,
        "state": layout.state,
        "action": list(layout.action),
        "instruction": layout.instruction,
        "image_size": config.image_size,
        "resize": RESIZE,
        "idle_filter": config.idle_filter,
    }
    return Kind(name, layout.meaning, settings, IDLE_FILTERS[config.idle_filter])


def _num_read(writer: DatasetWriter) -> int:
    return writer.manifest.progress.get("num_read", 0)


def _fill(
    writer: DatasetWriter,
    source: RldsSource,
    layout: Layout,
    config: ImportConfig,
    num_wanted: int,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Reads and stores episodes until none is missing."""
    num_read, origin = _num_read(writer), f"{source.name}/{source.version}/{config.split}"
    dropped = Counter(writer.manifest.progress.get("dropped", {NO_INSTRUCTION: 0, TOO_SHORT: 0}))
    episodes = read_episodes(source, layout, config.split, num_read, num_wanted, image_size=config.image_size)
    with progress(num_wanted, "import", "episode", initial=num_read) as bar:
        for steps in episodes:
            try:
                problem = _append(writer, steps, layout, camera=config.camera, origin=origin, index=num_read)
            except (DatasetError, ValueError) as error:
                name = "" if isinstance(error, DatasetError) else f"{name_episode(source, config.split, num_read)}: "
                message = f"{name}{error}"
                if not config.skip_broken:
                    raise DatasetError(f"{message}; --skip-broken leaves out and counts such episodes") from error
                if dropped[BROKEN] < NUM_NAMED:
                    say(f"left out: {message}")
                problem = BROKEN
            num_read += 1
            dropped.update([problem] if problem else [])
            bar.update(1, dropped=dropped.total())
            is_stopping = should_stop is not None and should_stop()
            if is_stopping or num_read == num_wanted or num_read % config.write_every == 0:
                writer.flush(progress={"num_read": num_read, "dropped": dict(dropped)})
            if is_stopping and num_read < num_wanted:
                raise Interrupted(f"import: {num_read} of {num_wanted} episodes read, safe in {writer.directory}")


def _append(
    writer: DatasetWriter, steps: EpisodeSteps | DatasetError, layout: Layout, *, camera: str, origin: str, index: int
) -> str | None:
    """Stores an episode, or returns the reason for which it is dropped.

    Where the instruction changes, another episode begins: every action is stored with the instruction of its own step.

    Raises:
        DatasetError, ValueError: it is broken.
    """
    if isinstance(steps, DatasetError):
        raise steps
    if not steps.instruction:
        return TOO_SHORT
    instructions = fill_instructions(steps.instruction)
    if instructions is None:
        return NO_INSTRUCTION
    for name, values in (("state", steps.state), ("action", steps.action)):
        if not (is_finite := np.isfinite(values).all(axis=1)).all():
            step = int(is_finite.argmin())
            raise ValueError(f"{name}: got {values[step].tolist()} in step {step}, expected finite numbers")
    action, first = layout.standardize(steps.state, steps.action)
    if not len(action):
        return TOO_SHORT
    n = 0
    for instruction, group in itertools.groupby(instructions[first : first + len(action)]):
        stop = n + len(list(group))
        states = slice(first + n, first + stop + 1)
        trajectory = _unmeasured({camera: steps.image[states]}, steps.state[states], action[n:stop])
        writer.append(trajectory, instruction=instruction, seed=None, source=origin, attempt=index)
        n = stop
    return None


def fill_instructions(instructions: Sequence[str]) -> list[str] | None:
    """Returns the instruction of every step: where a step has none, that of the step before, or the first there is.

    None where no step has one.
    """
    filled, last = [], next(filter(None, instructions), None)
    for text in instructions:
        last = text or last
        filled.append(last)
    return None if last is None else filled


def _unmeasured(images: Mapping[str, np.ndarray], state: np.ndarray, action: np.ndarray) -> Trajectory:
    """Returns an episode of observations and actions alone."""
    num_states = len(state)
    no_tokens = np.zeros((num_states, 0), np.int32)
    return Trajectory(
        observation=Observation(dict(images), state, no_tokens, no_tokens.astype(bool)),
        signals=None,
        valid=np.ones(num_states, bool),
        action=action,
        decisions=None,
    )
