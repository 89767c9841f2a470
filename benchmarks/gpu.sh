#!/usr/bin/env bash
# Everything that needs a GPU, in one command, planned for nine minutes. CSV files go to $OUT, or runs/gpu.
# Arguments are those of gpu.py, for instance: benchmarks/gpu.sh --device cpu --tiny. $PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" benchmarks/gpu.py --out "${OUT:-runs/gpu}" "$@"
