"""Output of a loop while it runs: progress, lines that do not tear it, tables."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

MEGABYTE = 10**6
"""Text that is said before a loop falls silent to compile something."""

_num_open_lines = 0
_is_silent = False


def silence() -> None:
    """Lets all functions here show nothing from now on: another process of the run shows the same."""
    global _is_silent
    _is_silent = True


@contextlib.contextmanager
def progress(
    total: int | None,
    desc: str,
    unit: str = "it",
    *,
    initial: int = 0,
    stream: Any = None,
    interval: float = 10.0,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Shows how far a loop is: `with progress(100, "sft", "step") as bar: bar.update(1, loss=0.3)`. May be nested.

    On a terminal a tqdm bar. Elsewhere a plain line with count, rate, remaining time and postfix at most every
    `interval` seconds and one at the end; an inner loop that ends within `interval` seconds prints none. A loop that
    goes on after some units that were done before begins with a line that says at which one.

    Args:
        total: number of units, those that were done before included, or None where it is not known.
        desc: what the loop does.
        unit: what is counted.
        initial: number of units that were done before; they count in the bar, and not in rate and remaining time.
        stream: where to print; standard error if None.
        interval: seconds between two plain lines.
        now: the clock of the plain lines.
    """
    global _num_open_lines
    stream = stream or sys.stderr
    if _is_silent:
        yield _Nothing()
        return
    if initial and (total is None or initial < total):
        of_all = "" if total is None else f" of {total}"
        announce(f"{desc}: going on at {unit} {initial + 1}{of_all}", stream=stream)
    if stream.isatty():
        # leave=None keeps only the outermost bar on the screen.
        shown = tqdm(total=total, desc=desc, unit=unit, initial=initial, file=stream, dynamic_ncols=True, leave=None)
        with shown as bar:
            yield _Bar(bar)
        return
    lines = _Lines(total, desc, unit, initial=initial, stream=stream, interval=interval, now=now)
    _num_open_lines += 1
    try:
        yield lines
    finally:
        _num_open_lines -= 1
        lines.finish(is_outermost=_num_open_lines == 0)


@contextlib.contextmanager
def progress_bytes(total: int, desc: str) -> Iterator[Callable[[int], None]]:
    """Shows how far reading or writing is, in whole megabytes: `with progress_bytes(n, "read") as on_bytes: ...`.

    Args:
        total: bytes.
        desc: what is done.
    """
    done = 0
    with progress(total // MEGABYTE, desc, "MB") as bar:

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            before, done = done, done + num_bytes
            bar.update(done // MEGABYTE - before // MEGABYTE)

        yield on_bytes


def say(text: str = "") -> None:
    """Prints a line to standard output without tearing the bars of `progress`."""
    if _is_silent:
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def announce(text: str, *, stream: Any = None) -> None:
    """Prints a line where progress is shown, without tearing the bars of `progress`.

    Args:
        text: the line.
        stream: where to print; standard error if None.
    """
    if _is_silent:
        return
    stream = stream or sys.stderr
    tqdm.write(text, file=stream)
    stream.flush()


@contextlib.contextmanager
def announced(what: str, *, every: float = 30.0) -> Iterator[None]:
    """Says what goes on inside, and from then on for how long already, every so many seconds."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            announce(f"{what}: {time.monotonic() - start:.0f} s")

    announce(what)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def announce_compiling(name: str, compiled: Callable) -> Callable:
    """Returns a compiled function as one that says, before its first call, that this call takes long."""
    pending = [f"{name} (done once; a minute for large models)"]

    def call(*arguments):
        if pending:
            announce(pending.pop())
        return compiled(*arguments)

    return call


class _Nothing:
    def update(self, n: int = 1, **postfix: Any) -> None:
        pass


class _Bar:
    def __init__(self, bar: tqdm):
        self._bar = bar

    def update(self, n: int = 1, **postfix: Any) -> None:
        if postfix:
            self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(n)


class _Lines:
    def __init__(
        self, total: int | None, desc: str, unit: str, *, initial: int, stream: Any, interval: float, now: Callable
    ):
        self._total, self._desc, self._unit, self._initial = total, desc, unit, initial
        self._stream, self._interval, self._now = stream, interval, now
        self._start = self._last_print = now()
        self._count, self._printed_count = initial, -1
        self._postfix: dict[str, Any] = {}

    def update(self, n: int = 1, **postfix: Any) -> None:
        self._count += n
        self._postfix |= postfix
        if self._now() - self._last_print >= self._interval:
            self._print()

    def finish(self, *, is_outermost: bool) -> None:
        is_long = self._now() - self._start >= self._interval
        if (is_outermost or is_long) and self._printed_count != self._count:
            self._print()

    def _print(self) -> None:
        self._last_print, self._printed_count = self._now(), self._count
        elapsed = self._last_print - self._start
        rate = (self._count - self._initial) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._desc}: {self._count}{'' if self._total is None else f'/{self._total}'} {self._unit}"]
        parts.append(f"{rate:.3g} {self._unit}/s")
        if self._total is not None and 0 < self._count < self._total and rate > 0:
            parts.append(f"ETA {tqdm.format_interval((self._total - self._count) / rate)}")
        else:
            parts.append(f"{tqdm.format_interval(elapsed)} elapsed")
        parts += [f"{name}={_short(value)}" for name, value in self._postfix.items()]
        print(", ".join(parts), file=self._stream, flush=True)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", stream: Any = None) -> None:
    """Prints a table: wrapped to the width of a terminal, else in plain aligned columns that nothing cuts off.

    Args:
        header: names of the columns; the first is aligned left, the others right.
        rows: one cell a column; shown with `str`.
        title: printed above the table.
        stream: where to print; standard output if None.
    """
    stream = stream or sys.stdout
    cells = [[str(cell) for cell in row] for row in rows]
    if stream.isatty():
        import rich.box
        import rich.console
        import rich.table
        import rich.text

        table = rich.table.Table(title=title or None, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(rich.text.Text(name), justify="right" if index else "left")
        for row in cells:
            table.add_row(*map(rich.text.Text, row))
        rich.console.Console(file=stream).print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [title] if title else []
    for row in [list(header), ["-" * width for width in widths], *cells]:
        aligned = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    print("\n".join(lines), file=stream, flush=True)
