"""Largest memory that a piece of work took."""

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


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
    try:
        text = _STATUS.read_text("utf-8")
    except OSError:
        return None
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(sizes[0]) if sizes else None
