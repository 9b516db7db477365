"""Metrics of a run: JSON lines, TensorBoard, W&B."""

import contextlib
import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stare_jax.config import ConfigError, Natural, check_fields
from stare_jax.documents import DocumentError, check_record, parse_json
from stare_jax.documents.reader import MAX_FLOAT
from stare_jax.logging.files import replace_text

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """The places that metrics go to, besides `metrics.jsonl`."""

    wandb: str = ""
    """project on W&B; empty for none."""
    tensorboard: bool = True
    """write event files into `tb/<phase>/`."""

    def __post_init__(self):
        check_fields(self)


class _Header(NamedTuple):
    """The fields of a line besides metrics."""

    step: Natural
    phase: str
    wall_time: float | None = None


class Writer:
    """Appends metrics to `metrics.jsonl` and passes them on to TensorBoard and W&B where these were asked for.

    `writer(step, {"ppo/clip_frac": 0.1}, phase="ppo")` writes one JSON object: step, phase, wall_time (seconds since
    the epoch) and the metrics, non-finite ones as null. Make one with `make_writer`; close it, or use it in a `with`.
    """

    def __init__(self, directory: str | Path | None, sinks: Sequence[Any] = ()):
        self._file = None if directory is None else _open_to_append(Path(directory) / METRICS_FILE)
        self._sinks = list(sinks)

    def __call__(self, step: int, metrics: Mapping[str, Any], *, phase: str = "run") -> None:
        """Writes one line of metrics.

        Args:
            step: optimiser steps or iterations of the phase so far.
            metrics: scalars by name, `area/quantity`.
            phase: which phase of the run they belong to; steps are counted within a phase.

        Raises:
            ValueError: a name is not `area/quantity`.
        """
        if wrong := [name for name in metrics if "/" not in name]:
            raise ValueError(f"metrics: names must be 'area/quantity', got {wrong}")
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = dict(zip(_Header._fields, (int(step), phase, time.time()), strict=True))
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        data = (json.dumps(line) + "\n").encode()
        while data:  # Nothing is held back, which a full disk would refuse when the file is closed.
            data = data[self._file.write(data) :]
        for sink in self._sinks:
            sink(int(step), values, phase)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # What one of them cannot close keeps no other open.
            for part in (self._file, *self._sinks):
                if part is not None:
                    stack.callback(part.close)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_writer(
    directory: str | Path, *, tensorboard: bool = True, wandb: str = "", config: Mapping[str, Any] | None = None
) -> Writer:
    """Opens the metrics of a run directory; earlier lines are kept. Only process 0 of a multi-host run writes.

    Args:
        directory: the run directory, made if it does not exist; its name is that of the run on W&B.
        tensorboard, wandb: as in `LoggingConfig`.
        config: configuration of the run, for W&B.
    """
    from stare_jax.sharding import pod  # here, so that a command that prints a line need not wait for JAX

    if not pod.is_main():
        return Writer(None)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sinks: list[Any] = [_TensorBoard(directory / "tb")] if tensorboard else []
    if wandb:
        sinks.append(_Wandb(directory, wandb, config or {}))
    return Writer(directory, sinks)


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a run directory's `metrics.jsonl` in order of writing, nulls as NaN; [] without a file.

    A last line without its end, which a killed process has left or another one is writing, is passed over.

    Raises:
        DocumentError: a line is damaged, or has no step or phase, or a metric that is no number.
    """
    path = Path(directory) / METRICS_FILE
    if not path.exists():
        return []
    *whole, torn = path.read_bytes().split(b"\n")
    lines = []
    for number, content in enumerate([*whole, torn] if _is_json(torn) else whole, start=1):
        if content.strip():
            line = _parse(content, f"{path}: line {number}")
            _check_line(line, f"{path}: line {number}")
            lines.append(line)
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _check_line(line: dict[str, Any], place: str) -> None:
    """Raises DocumentError where a line has no step or phase, or a metric that is neither finite nor null."""
    check_record(_Header, line, place)
    metrics = {name: value for name, value in line.items() if name not in _Header._fields}
    numbers = [value for value in metrics.values() if value is not None]
    # cheap: lines are many
    if not all(type(value) in (int, float) and abs(value) <= MAX_FLOAT for value in numbers):
        check_record(dict[str, float | None], metrics, place)


def last_lines(lines: Sequence[Mapping[str, Any]], phase: str) -> list[Mapping[str, Any]]:
    """Returns the lines of a phase that count, in order of their steps.

    A run that is killed goes on from its last checkpoint: its next line replaces every earlier one of the same step and
    of later steps, which belong to a history that was given up.
    """
    rows: list[Mapping[str, Any]] = []
    for line in lines:
        if line.get("phase") == phase:
            while rows and rows[-1]["step"] >= line["step"]:
                rows.pop()
            rows.append(line)
    return rows


def _open_to_append(path: Path):
    """Opens a JSONL file at its end; a last line that a killed process left torn is ended, or cut off if unreadable."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        whole, _, torn = content.rpartition(b"\n")
        with path.open("rb+") as file:
            if _is_json(torn):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(len(whole) + 1 if whole else 0)
    return path.open("ab", buffering=0)


def _is_json(line: bytes) -> bool:
    try:
        _parse(line, "")
    except DocumentError:
        return False
    return True


def _parse(line: bytes, place: str) -> dict[str, Any]:
    """Returns the fields of a line; raises DocumentError where it is no JSON object."""
    try:
        return parse_json(line.decode(), place, what="line")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{place}: got a line that is no text ({error}), expected JSON") from error


class _TensorBoard:
    """One event directory per phase, because each phase counts its own steps."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._writers: dict[str, Any] = {}

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        if phase not in self._writers:
            from tensorboardX import SummaryWriter

            # A phase that goes on from an earlier checkpoint gives up all from its first step on.
            self._writers[phase] = SummaryWriter(
                str(self._directory / phase), flush_secs=10, purge_step=step, filename_suffix=f".{step}"
            )
        for name, value in metrics.items():
            self._writers[phase].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """W&B wants one increasing step per run, so every phase logs a step of its own beside its metrics.

    A run that goes on is the same run on W&B: its id is kept in the run directory.
    """

    def __init__(self, directory: Path, project: str, config: Mapping[str, Any]):
        import wandb

        file = directory / "wandb_id"
        if not file.exists():
            replace_text(file, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=directory.resolve().name,
                id=file.read_text("utf-8"),
                resume="allow",
                dir=str(directory),
                config=dict(config),
            )
        except Exception as error:  # no login, no network, no rights: of whatever kind W&B makes it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"config.logging.wandb: got {project!r}, expected a project that W&B opens here: {reason} "
                "(wandb login; WANDB_MODE=offline needs none)"
            ) from error

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._run.log({f"{phase}/step": step} | {f"{phase}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()
