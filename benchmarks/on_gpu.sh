#!/bin/sh
# Measures both models on one GPU in at most eight minutes; --help says more, --reduced tries it on a CPU.
# PYTHON names the interpreter: that of .venv where there is one, else python3.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
[ -n "${PYTHON:-}" ] || { [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python; } || PYTHON=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" "$root/benchmarks/on_gpu.py" "$@"
