"""A sign of life of a run, on disk, and the end of one that hangs."""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from stare_jax.logging.clock import RESTART
from stare_jax.logging.files import replace_text

HEARTBEAT_FILE = "heartbeat.json"


class Heartbeat:
    """Tells that a loop is alive. Use it in a `with`, and call `beat` wherever the loop comes by.

    `heartbeat.json` says when the last beat was that was written, in seconds since the epoch, and of which process.
    Time is measured by a clock that nobody sets.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        hang_timeout: float = 0.0,
        every: float = 10.0,
        now: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ):
        """
        Args:
            directory: folder of the file; None writes none, as of several processes one does.
            hang_timeout: seconds without a beat after which the process prints what all its threads do, and ends with
                the code `RESTART`; 0 waits for ever.
            every: seconds between two writings of the file.
            now: the clock.
            end: ends the process.
        """
        self._file = None if directory is None else directory / HEARTBEAT_FILE
        self._every, self._now, self._end = every, now, end
        self._hang_timeout = hang_timeout
        self._last, self._written, self._num_beats = now(), -float("inf"), 0
        self._done = threading.Event()

    def beat(self) -> None:
        """Takes note that the loop is alive; writes the file if the last writing is long ago."""
        self._last = self._now()
        self._num_beats += 1
        if self._file is not None and self._last - self._written >= self._every:
            self._written = self._last
            about = {"time": time.time(), "pid": os.getpid(), "host": platform.node(), "num_beats": self._num_beats}
            with contextlib.suppress(OSError):  # A disk that is full is said where something is lost by it.
                replace_text(self._file, json.dumps(about) + "\n")

    def __enter__(self) -> "Heartbeat":
        self.beat()
        if self._hang_timeout > 0:
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._hang_timeout / 4)):
            if (silent := self._now() - self._last) > self._hang_timeout:
                print(f"\nhangs: no sign of life for {silent:.0f} s (--hang_timeout)", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                self._end(RESTART)
                return
