#!/usr/bin/env bash
# Everything that needs a GPU, in one command, planned for nine minutes. CSV files go to $OUT, or runs/gpu.
# Arguments are those of gpu.py, for instance: benchmarks/gpu.sh --device cpu --tiny. $PYTHON names the interpreter.
# Only the trainings on CIFAR-10, in 200 seconds: benchmarks/gpu.sh --blocks cifar10 --minutes 3.3 --data FOLDER,
# with a folder that gpu_training.py packed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/examples/reproduce${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32} # a queue for each of the streams
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" benchmarks/gpu.py --out "${OUT:-runs/gpu}" "$@"
