"""Largest memory that a piece of work took."""

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""files with the limit of a container, in one version of control groups and the other"""


class PeakMemory:
    """Watches the process's anonymous memory while open; pages of mapped files do not count.

    `with PeakMemory() as memory: ...; memory.peak` in bytes; None where the system does not say (not Linux).

    Args:
        interval: seconds between two looks.
    """

    def __init__(self, interval: float = 0.01):
        self._interval = interval
        self._done = threading.Event()
        self.start = self.peak = anonymous_bytes()

    def __enter__(self) -> "PeakMemory":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.start is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int | None:
    """Returns how much anonymous memory the process holds now; None where the system does not say."""
    return _size(_STATUS, "RssAnon")


def available_bytes() -> int | None:
    """Returns how much memory the process can still take: what the system has to give, or less where the container that
    it runs in has a limit; None where the system does not say."""
    free = _size(_MEMORY, "MemAvailable")
    if free is None:
        return None
    limits = [int(text) for text in map(_read, _LIMITS) if text is not None and text.strip().isdecimal()]
    return min([free, *(limit - (anonymous_bytes() or 0) for limit in limits)])


def _size(file: Path, name: str) -> int | None:
    """Returns the bytes of one line of a file, as `MemAvailable:  1024 kB`."""
    lines = (_read(file) or "").splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(sizes[0]) if sizes else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text("utf-8")
    except OSError:
        return None
