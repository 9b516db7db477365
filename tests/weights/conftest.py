"""Command lines and benchmarks are no packages: their folders go on the path, as they do when they are run."""

import sys
from pathlib import Path

for folder in ("benchmarks", "launch"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))
