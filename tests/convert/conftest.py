"""Where the independent PyTorch model that benchmarks and tests share is found."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
