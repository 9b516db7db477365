"""Damages every kind of file that a run writes, and prints what became of it.

    python tests/fuzz/damages.py                 1,000 damages: files cut off, with a bit changed, exchanged, or missing
    python tests/fuzz/damages.py --only=metrics --seed=1

Each is refused by one clear error, or harmless, which is to say that all is read as before. A bit of a JSON file that
makes another lawful document of it, such as another digit, is counted apart: JSON has no checksum. Exit code 1 where a
reading failed, or took something else for what was there.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "launch"), str(TESTS)]
sys.path += [str(path) for path in sorted(TESTS.iterdir()) if path.is_dir()]

from checkpoint_kinds import CHECKPOINTS  # noqa: E402
from file_kinds import DATA, RUNS  # noqa: E402
from trials import Kind, table, try_kind  # noqa: E402

NUM_DAMAGES = 1000
KINDS = ("cut off", "bit changed", "exchanged", "missing")
NOT_OURS = ("config.json of a model", "configuration in Python", "study in Python", "job of a study")
"""kinds of files that a run does not write"""


def kinds() -> tuple[Kind, ...]:
    """Returns the kinds of files that a run writes."""
    return tuple(kind for kind in (*DATA, *RUNS, CHECKPOINTS) if kind.name not in NOT_OURS)


def damage(name: str, whole: Mapping[str, bytes], rng: Random) -> bytes | None:
    """Returns the content of a file that was damaged on disk; None for one that is gone."""
    content, kind = whole[name], rng.choice(KINDS)
    if kind == "missing":
        return None
    if kind == "exchanged" and (others := [other for other in sorted(whole) if other != name]):
        return whole[rng.choice(others)]
    if kind == "bit changed" and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[: rng.randrange(len(content))] if content else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", metavar="WORD", default="", help="kinds with this word in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damages", type=int, default=NUM_DAMAGES, help=f"in all (default: {NUM_DAMAGES})")
    arguments = parser.parse_args()
    chosen = [kind for kind in kinds() if arguments.only in kind.name]
    rows: dict[str, Counter] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as base:
        for number, kind in enumerate(chosen):
            count = arguments.damages // len(chosen) + (number < arguments.damages % len(chosen))
            rows[kind.name], failed = try_kind(kind, Path(base) / str(number), count, arguments.seed, change=damage)
            failures += failed
            print(".", end="", file=sys.stderr, flush=True)
    print("\n\n".join(["", *failures]))
    print(table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
