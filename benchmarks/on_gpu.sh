#!/usr/bin/env bash
# What a first hour on a GPU is for, in parts that are meant to end within eight minutes; checks before timings:
#
#     bash benchmarks/on_gpu.sh PART [OPTIONS]
#
#   build       the kernels, for the GPU at hand
#   checks      graphs, devices and waits, with short trainings; then every operator, in four processes
#   kernels     each operator beside eager PyTorch and torch.compile; OPTIONS of benchmarks.kernels, such as
#               --only NAME --out FILE for a part of them
#   training    seconds a step of ResNet-18 with PGD-10, every switch by itself; three of them compile, so one of
#               OBJECTIVES (default "pgd_at trades") a call may be as much as fits
#   large       the same for WRN-28-10 and WRN-70-16, bfloat16 alone
#   autoattack  beside the official package where it is installed; MODEL and EPS name the network
#   table2      a row of Table 2, for SECONDS_TO_TRAIN (default 400); the next call goes on
#
# It needs torch 2.11 or newer, setuptools 77 or newer, pybind11, ninja, pytest, pytest-xdist, hypothesis, and what
# `pip install ".[training]"` installs, also as folders in PYTHONPATH. PYTHON names the interpreter (default python3).
# DATA_ROOT names the folder of CIFAR-10 for training, large, autoattack and table2, RESULTS and RUNS the folders for
# results, named after the device (default benchmarks/results), and for runs (default runs). Without a GPU every part
# runs on the CPU, smaller, to try it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
part="${1:-}"
shift || true
results=${RESULTS:-benchmarks/results}
mkdir -p "$results"
usage() {
  sed -n '2,20s/^# \{0,1\}//p' "$0"
  exit 2
}
case "$part" in
build | checks | kernels) ;;
training | large | autoattack | table2) : "${DATA_ROOT:?folder of CIFAR-10}" ;;
*) usage ;;
esac
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
on_device=(--data cifar10 --data-root "${DATA_ROOT:-}" --device "$device")
echo "part: $part, device: $device"

case "$part" in
build)
  if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv | tee "$results/$device-device.txt"
    export SCOREMATCH_CUDA=1
  fi
  "$python" setup.py build_ext --inplace
  ;;
checks)
  # Without those that build for the CPU alone, which come first and take longer than all others.
  build=tests/ops/test_build.py failed=0
  if [ "$device" = cuda ]; then
    "$python" -c 'from scorematch import _extension; assert _extension.has_cuda_kernels, "first: on_gpu.sh build"'
  fi
  "$python" -m pytest -q tests/library/test_graphs.py tests/test_devices.py tests/training/test_waits.py \
    tests/training/test_hardware.py "$@" 2>&1 | tee "$results/$device-tests.txt" || failed=1
  "$python" -m pytest -q tests/ops --numprocesses 4 \
    --ignore tests/ops/test_emulated_device.py --ignore tests/ops/test_sanitizers.py \
    --deselect "$build::test_cuda_compiles_without_spills" --deselect "$build::test_every_instruction_set" \
    "$@" 2>&1 | tee -a "$results/$device-tests.txt" || failed=1
  exit "$failed"
  ;;
kernels)
  [ $# -gt 0 ] || set -- --out "$results/$device.json"
  "$python" -m benchmarks.kernels --device "$device" "$@" | tee "$results/$device-table.txt"
  ;;
training)
  network=wrn-10-1 steps=1 rounds=2
  variants=(plain channels_last "all three" "all three, bfloat16")
  if [ "$device" = cuda ]; then
    network=preact-resnet-18-plain steps=20 rounds=3
    variants=(plain channels_last tf32 bfloat16 graph "bfloat16, graph" "bfloat16, compiled" "bfloat16, compiled, graph" auto)
  fi
  read -ra objectives <<< "${OBJECTIVES:-pgd_at trades}"
  "$python" -m benchmarks.training "${on_device[@]}" --model "$network" --objectives "${objectives[@]}" \
    --steps "$steps" --rounds "$rounds" --variants "${variants[@]}" --out "$results/$device-training-$network.json" "$@"
  ;;
large)
  networks=(wrn-10-1-silu) batch=8 steps=1 variants=(bfloat16)
  if [ "$device" = cuda ]; then
    networks=(wrn-28-10-silu wrn-70-16-silu) batch=64 steps=5 variants=(bfloat16 "bfloat16, graph")
  fi
  for network in "${networks[@]}"; do
    "$python" -m benchmarks.training "${on_device[@]}" --model "$network" --objectives trades --batch "$batch" \
      --steps "$steps" --rounds 2 --variants "${variants[@]}" --out "$results/$device-training-$network.json" "$@"
  done
  ;;
autoattack)
  "$python" -m benchmarks.autoattack --model-from "${MODEL:?weights, such as runs/NAME/best.pt}" "${on_device[@]}" \
    --eps "${EPS:?radius of the perturbation}" --samples "${SAMPLES:-1000}" --batch 500 --search-dtype bfloat16 \
    --out "$results/$device-autoattack.json" "$@"
  ;;
table2)
  run=${RUNS:-runs}/table2-pgd_at-se-clip
  options=(--resume "$run")
  if [ ! -e "$run/config.toml" ]; then
    options=(--recipe table2 --objective pgd_at --divergence se --clip 0.4 --lr 0.05 --validation-losses se)
    options+=("${on_device[@]}" --out "$run" "$@")
  fi
  timeout --signal TERM "${SECONDS_TO_TRAIN:-400}" "$python" -m training.run "${options[@]}" || true # it says how to go on
  ;;
esac
