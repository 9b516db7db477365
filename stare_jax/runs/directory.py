"""What a run directory remembers of how it came about, so that nothing of two configurations is ever mixed.

A phase that has begun keeps `<phase>/record.json`: its own configuration and the record of the phase it starts from.
Going on is allowed with the same record only; what has not begun may still be changed.
"""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stare_jax.config import ConfigError
from stare_jax.logging import replace_text, say, write_metadata

SHARED_FIELDS = ("env", "model", "stages", "demos", "seed", "init_from", "demos_from")
"""what all phases depend on."""
MACHINE_FIELDS = tuple(
    f"config.env.{name}"
    for name in ("num_workers", "envs_per_worker", "worker_timeout_s", "start_timeout_s", "max_restarts")
)
"""parts of those that change the speed, and which random numbers an episode sees, but no task."""
GROWING_FIELDS = {"sft": "config.num_steps", "ppo": "config.num_iterations"}
"""of a phase, which may be made longer; a learning rate that decays is from then on that of the longer schedule."""

_RECORD, _FINISHED = "record.json", "finished.json"
_LOCK = "lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """While open, keeps other processes out of a run directory; the system lets go of the lock of a process that dies.

    Raises:
        ConfigError: another process is in there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory}: another process is at work on this run; wait for it, or choose another --workdir"
            ) from error
        except OSError:
            say(f"{directory} is on a file system without locks: do not start a run there twice")
        yield


def open_directory(directory: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Makes a run directory, or checks that the one there is of the same model, task and data.

    Args:
        directory: of the run.
        config: the whole configuration, JSON-able.
        resume: whether there may be a run already.

    Raises:
        ConfigError: names the fields that differ, or says that there is a run.
    """
    file = directory / "config.json"
    if file.exists() and any((directory / name).exists() for name in ("data", "sft", "tpo", "ppo")):
        if not resume:
            raise ConfigError(f"{directory}: holds a run already; --resume goes on with it, --workdir chooses another")
        changed = differences(_read(file), _plain(config), "config")
        changed = [line for line in changed if not line.startswith(MACHINE_FIELDS)]
        if refused := [line for line in changed if re.match(r"config\.(\w+)", line)[1] in SHARED_FIELDS]:
            raise ConfigError(
                f"{directory}: holds a run of another configuration: {'; '.join(refused)}; --workdir chooses another"
            )
        for line in changed:
            say(f"changed since the run began: {line}")
    write_metadata(directory, config)


def differences(old: Any, new: Any, path: str) -> list[str]:
    """Returns a line for every field in which two JSON documents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{path}.{name}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def is_finished(phase_directory: Path) -> bool:
    """Says whether a phase has been trained to its end."""
    return (phase_directory / _FINISHED).exists()


def begin_phase(phase_directory: Path, section: dict[str, Any], predecessor: Path | None) -> bool:
    """Records what a phase is begun with; returns whether it has been finished like that already.

    Args:
        phase_directory: of the phase.
        section: its configuration, JSON-able.
        predecessor: directory of the phase that it starts from, None for what the configuration starts from.

    Raises:
        ConfigError: it was begun with another configuration, or the phase before it was; names the fields.
    """
    record = _plain({"config": section, "after": None if predecessor is None else _read(predecessor / _RECORD)})
    if (phase_directory / _RECORD).exists():
        changed = differences(_read(phase_directory / _RECORD), record, "")
        changed = [line.removeprefix(".") for line in changed]
        if refused := [line for line in changed if not _has_grown(line, phase_directory.name)]:
            raise ConfigError(
                f"{phase_directory}: was begun with another configuration: {'; '.join(refused)}; delete it, and what "
                f"came after it, to do the phase again, or choose another --workdir"
            )
        if not changed and is_finished(phase_directory):
            return True
    (phase_directory / _FINISHED).unlink(missing_ok=True)
    replace_text(phase_directory / _RECORD, json.dumps(record, indent=1) + "\n")
    return False


def finish_phase(phase_directory: Path) -> None:
    """Records that a phase has been trained to its end."""
    replace_text(phase_directory / _FINISHED, json.dumps({"finished": True}) + "\n")


def _has_grown(line: str, phase: str) -> bool:
    field, change = line.split(" was ", 1)
    if field != GROWING_FIELDS.get(phase):
        return False
    old, new = change.split(", is ")
    return int(new) > int(old)


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))
