#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels for it, runs the operator tests on it, times the kernels, and leaves the
# results in benchmarks/results/. Without one it does the same on the CPU, to try the script.
#
#     bash benchmarks/on_gpu.sh [options of benchmarks.kernels]
#
# With a trained model it also times AutoAttack, beside the official package where that is installed:
#
#     MODEL=runs/NAME/best.pt DATA=cifar10 DATA_ROOT=FOLDER EPS=0.03137 SAMPLES=1000 bash benchmarks/on_gpu.sh
#
# With CIFAR-10 it times training, every switch by itself, and with SECONDS_TO_TRAIN it trains a row of Table 2 for that
# long, going on where the call before it stopped:
#
#     DATA_ROOT=FOLDER SECONDS_TO_TRAIN=500 bash benchmarks/on_gpu.sh
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
python -m pytest -q tests/ops tests/library/test_graphs.py 2>&1 | tee "benchmarks/results/$device-tests.txt"
python -m benchmarks.kernels --device "$device" "$@" | tee "benchmarks/results/$device-table.txt"

if [ -n "${MODEL:-}" ]; then
  python -m benchmarks.autoattack --model-from "$MODEL" --data "${DATA:-cifar10}" ${DATA_ROOT:+--data-root "$DATA_ROOT"} \
    --eps "${EPS:?radius of the perturbation}" --samples "${SAMPLES:-1000}" --batch 500 --device "$device" \
    --compile --search-dtype bfloat16 --out "benchmarks/results/$device-autoattack.json"
fi

if [ -n "${DATA_ROOT:-}" ]; then
  on_device=(--data cifar10 --data-root "$DATA_ROOT" --device "$device")
  variants=(plain "fused optimiser" channels_last folded "all three")
  networks=(wrn-10-1)
  steps=1
  if [ "$device" = cuda ]; then
    variants+=(tf32 bfloat16 compiled "bfloat16, compiled" graph "bfloat16, graph" "bfloat16, compiled, graph")
    networks=(preact-resnet-18-plain wrn-28-10-silu)
    steps=20
  fi
  for network in "${networks[@]}"; do
    python -m benchmarks.training "${on_device[@]}" --model "$network" --objectives pgd_at trades --steps "$steps" \
      --variants "${variants[@]}" --out "benchmarks/results/$device-training-$network.json"
  done
fi

if [ -n "${SECONDS_TO_TRAIN:-}" ]; then
  run=runs/table2-pgd_at-se-clip
  if [ -e "$run/config.toml" ]; then
    options=(--resume "$run")
  else
    options=(--recipe table2 --objective pgd_at --divergence se --clip 0.4 --lr 0.05 --validation-losses se)
    options+=(--data-root "${DATA_ROOT:?folder of CIFAR-10}" --device "$device" --precision bfloat16 --out "$run")
  fi
  timeout --signal TERM "$SECONDS_TO_TRAIN" python -m training.run "${options[@]}" || true # it says how to go on
fi
