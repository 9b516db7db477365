"""The set-up scripts are no package: their folder goes on the path, as it does when they are run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
