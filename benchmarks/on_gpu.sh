#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels for it, runs the operator tests on it, times the kernels, and leaves the
# results in benchmarks/results/. Without one it does the same on the CPU, to try the script.
#
#     bash benchmarks/on_gpu.sh [options of benchmarks.kernels]
#
# With a trained model it also times AutoAttack, beside the official package where that is installed:
#
#     MODEL=runs/NAME/best.pt DATA=cifar10 DATA_ROOT=FOLDER EPS=0.03137 SAMPLES=1000 bash benchmarks/on_gpu.sh
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

if [ -n "${MODEL:-}" ]; then
  python -m benchmarks.autoattack --model-from "$MODEL" --data "${DATA:-cifar10}" ${DATA_ROOT:+--data-root "$DATA_ROOT"} \
    --eps "${EPS:?radius of the perturbation}" --samples "${SAMPLES:-1000}" --batch 500 --device "$device" \
    --compile --search-dtype bfloat16 --out "benchmarks/results/$device-autoattack.json"
fi
