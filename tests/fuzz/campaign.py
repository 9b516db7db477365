"""Tries changes of every kind of file that the library reads, and command lines, and prints what became of them.

    python tests/fuzz/campaign.py                       2,000 files and 500 command lines; ten minutes of a core
    python tests/fuzz/campaign.py --only=manifest --seed=1

Exit code 1 where a reading or a command failed, accepted something else in silence, or changed what was there.
"""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "launch"), str(TESTS)]
sys.path += [str(path) for path in sorted(TESTS.iterdir()) if path.is_dir()]

from checkpoint_kinds import CHECKPOINTS, RLDS  # noqa: E402
from command_lines import try_lines  # noqa: E402
from file_kinds import DATA, OTHERS, RUNS  # noqa: E402
from trials import Kind, table, try_kind  # noqa: E402

NUM_CHANGES, NUM_LINES = 2000, 500
SLOW = {CHECKPOINTS.name: 100, RLDS.name: 60}
"""changes of the kinds that take a tenth of a second or more to be read"""
LINES = "command lines"


def kinds() -> tuple[Kind, ...]:
    """Returns all kinds; those that need TensorFlow come last, as a renderer cannot be started after it."""
    return (*OTHERS, *DATA, *RUNS, CHECKPOINTS, RLDS)


def num_changes(kind: Kind) -> int:
    """Returns how many changes of a kind the whole campaign tries."""
    quick = [other for other in kinds() if other.name not in SLOW]
    return SLOW.get(kind.name, -(-(NUM_CHANGES - sum(SLOW.values())) // len(quick)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", metavar="WORD", default="", help="kinds with this word in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=float, default=1.0, help="how many times as much is tried (default: 1)")
    arguments = parser.parse_args()
    rows, failures = {}, []
    with tempfile.TemporaryDirectory() as base:
        for number, kind in enumerate(kinds()):
            if arguments.only in kind.name:
                count = round(arguments.times * num_changes(kind))
                rows[kind.name], failed = try_kind(kind, Path(base) / str(number), count, arguments.seed)
                failures += failed
                print(".", end="", file=sys.stderr, flush=True)
        lines = {}
        if arguments.only in LINES:
            count = round(arguments.times * NUM_LINES)
            lines[LINES], failed = try_lines(Path(base) / "lines", count, arguments.seed)
            failures += failed
    print("\n\n".join(["", *failures]))
    print(table(rows))
    for name, counts in lines.items():
        print(
            f"{name}: {counts.total()} tried, {', '.join(f'{number} {outcome}' for outcome, number in counts.items())}"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
