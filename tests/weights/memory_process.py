"""Run by test_memory.py; converts something and prints by how much its own memory grew at most, in bytes.

    python memory_process.py SMALL OUT --from=... --to=...

A small checkpoint is converted first, so that what is imported and compiled once counts as there before.
"""

import gc
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
import convert as command


def anonymous():
    """Bytes of memory that is no file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def growth(*arguments):
    """Largest growth of memory while the command ran, in bytes."""
    gc.collect()
    start = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert command.main([*arguments]) == 0
    done.set()
    watcher.join()
    return peak - start


small, out, *arguments = sys.argv[1:]
growth(f"--from={small}", f"--to={out}")
print(growth(*arguments))
