#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels for it, runs the operator tests on it, times the kernels, and leaves the
# results in benchmarks/results/. Without one it does the same on the CPU, to try the script.
#
#     bash benchmarks/on_gpu.sh [options of benchmarks.kernels]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
mkdir -p benchmarks/results

device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
echo "device: $device"
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv | tee "benchmarks/results/$device-device.txt"
  export SCOREMATCH_CUDA=1
fi

python setup.py build_ext --inplace
python -m pytest -q tests/ops 2>&1 | tee "benchmarks/results/$device-tests.txt"
python -m benchmarks.kernels --device "$device" "$@" | tee "benchmarks/results/$device-table.txt"
