"""Circumstances of a run: all that the last bits of its numbers depend on, and that may change while it goes on."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from stare_jax.logging import versions
from stare_jax.runs.config import RunConfig
from stare_jax.runs.start import STATISTICS_FILE

NUMBERING = ("num_workers", "envs_per_worker", "num_groups", "has_spares")
"""Fields of `EnvConfig` that decide which environment plays which episode."""


def circumstances_of(config: RunConfig) -> dict[str, Any]:
    """Returns the circumstances in which a run works now, as JSON takes them: packages, machine, devices, layout."""
    found = versions()
    return {name: found[name] for name in ("packages", "commit", "device", "processor")} | {
        "num_cores": len(os.sched_getaffinity(0)),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "mesh": dataclasses.asdict(config.mesh),
        "env": {name: getattr(config.env, name) for name in NUMBERING},
    }


def fingerprint_statistics(directory: Path) -> str:
    """Returns 12 hexadecimal digits of a run's normalisation statistics; "" where it has none."""
    file = directory / STATISTICS_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else ""
