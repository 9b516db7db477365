"""Time of a loop by area of work, and requests to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_AREA_NAMES = {"env": "simulator"}
_AREA_ORDER = ("env", "policy", "update", "data")


class Clock:
    """Wall-clock seconds by area of work: `with clock("env"): ...`.

    Every moment is charged to one area, the innermost that is open, and to "other" where none is.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._mark = now()

    @contextlib.contextmanager
    def __call__(self, area: str) -> Iterator[None]:
        self._charge()
        self._open.append(area)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def reset(self) -> None:
        """Starts again from zero; areas that are open stay open."""
        self._charge()
        self._seconds = {}

    def seconds(self) -> dict[str, float]:
        """Returns seconds by area since the last reset, "other" last; their sum is the time that has passed."""
        self._charge()
        return _in_order(self._seconds)

    def fractions(self) -> dict[str, float]:
        """Returns `seconds()` as fractions of the time that has passed; zeros where none has."""
        return _fractions(self.seconds())

    def line(self) -> str:
        """Returns where the time went in words: `simulator 61 %  policy 14 %  update 22 %  other 3 %`."""
        return _in_words(self.seconds())

    def total_line(self) -> str:
        """Returns `line()` of all the time since the clock was made, whatever resets there were."""
        self._charge()
        return _in_words(_in_order(self._total))

    def _charge(self) -> None:
        now = self._now()
        area = self._open[-1] if self._open else "other"
        for seconds in (self._seconds, self._total):
            seconds[area] = seconds.get(area, 0.0) + now - self._mark
        self._mark = now


def _in_order(seconds: dict[str, float]) -> dict[str, float]:
    areas = [area for area in _AREA_ORDER if area in seconds]
    areas += [area for area in seconds if area not in (*areas, "other")]
    return {area: seconds[area] for area in areas} | {"other": seconds.get("other", 0.0)}


def _fractions(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {area: value / total if total > 0 else 0.0 for area, value in seconds.items()}


def _in_words(seconds: dict[str, float]) -> str:
    return "  ".join(f"{_AREA_NAMES.get(area, area)} {100 * part:.0f} %" for area, part in _fractions(seconds).items())


RESTART = 75
"""Exit code of a process that was stopped from outside and is to be started again: EX_TEMPFAIL of `sysexits.h`."""


class Interrupted(Exception):
    """A loop was asked to stop and has saved what it needs to go on."""


class Interruption:
    """Makes SIGINT and SIGTERM set `requested` instead of ending the process, while open; a second signal ends it.

    Loops poll `requested`, save, and raise `Interrupted`. Outside the main thread, where Python allows no handlers,
    it does nothing.

    Args:
        grace: seconds after the first signal after which the process ends with the code `RESTART`, finished or not; 0
            waits for ever.
        end: ends the process.

    Raises:
        KeyboardInterrupt: at the second signal, wherever the program is then.
    """

    last_signal: int | None = None
    """the signal that was handled last in this process, for its exit code."""

    def __init__(self, *, grace: float = 0.0, end: Callable[[int], None] = os._exit) -> None:
        self.requested = False
        self._grace, self._end = grace, end
        self._timer: threading.Timer | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        Interruption.last_signal = number
        if self.requested:
            raise KeyboardInterrupt(f"second signal ({name})")
        self.requested = True
        if self._grace > 0:
            self._timer = threading.Timer(self._grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        # os.write, because print is not safe in a signal handler.
        os.write(2, f"\n{name}: stopping after this step and saving; once more to stop at once\n".encode())

    def _give_up(self) -> None:
        os.write(2, f"\nnot done {self._grace:g} s after the signal: what was saved before it counts\n".encode())
        self._end(RESTART)
