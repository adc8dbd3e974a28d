#!/usr/bin/env bash
# Builds the CUDA code and runs all of tests/gpu that needs nothing but a card and torch: the kernels and the Triton op
# against float64, the TensorRT adapters driven as TensorRT would, and the kernels under compute-sanitizer.
#
#   tests/gpu/run.sh [pytest arguments]
#
# CUDA_ARCH=90   the card's SM            SANITIZE=0   leave compute-sanitizer out
# BUILT=DIR      do not build: take what tests/gpu/CMakeLists.txt built elsewhere from DIR
# PYTHON         one with torch, numpy and pytest (python3)
# TENSORRT_ROOT, TENSORRT8_ROOT   headers of TensorRT 10 and 8.5; adapters without theirs are left out
#
# What could not run is named at the end, and why; the exit code is 1 when something failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
passed=() failed=() left_out=()

step() { # step NAME COMMAND...
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  if "$@"; then passed+=("$name ($((SECONDS - began)) s)"); else failed+=("$name"); fi
}

if [ -z "${BUILT:-}" ]; then
  BUILT=build/gpu/out
  mkdir -p build
  cmake -S tests/gpu -B build/gpu -DVIMDEPLOY_CUDA_ARCHITECTURES="${CUDA_ARCH:-90}-real" \
    -DTENSORRT_ROOT="${TENSORRT_ROOT:-}" -DTENSORRT8_ROOT="${TENSORRT8_ROOT:-}" >build/gpu.log 2>&1 &&
    cmake --build build/gpu --parallel >>build/gpu.log 2>&1 || { tail -50 build/gpu.log; exit 1; }
fi
BUILT=$(realpath "$BUILT")
export VIM_CUDA_LIBRARY=$BUILT/libvimdeploy_cuda.so
[ -f "$VIM_CUDA_LIBRARY" ] || { echo "there is no $VIM_CUDA_LIBRARY"; exit 1; }

for each in "trt_plugin_host libvimdeploy_trt.so" "trt8_plugin_host libvimdeploy_trt8.so"; do
  read -r host library <<<"$each"
  if [ -x "$BUILT/$host" ] && [ -f "$BUILT/$library" ]; then
    step "$library" bash -c "set -o pipefail; '$BUILT/$host' '$BUILT/$library' --gpu | grep -v '^ok'"
  else
    left_out+=("$library: not built, for want of TensorRT's headers")
  fi
done
step pytest "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir=tests/gpu tests/gpu "$@"
if [ "${SANITIZE:-1}" != 1 ]; then
  left_out+=("compute-sanitizer: SANITIZE=${SANITIZE}")
elif ! command -v compute-sanitizer >/dev/null; then
  left_out+=("compute-sanitizer: not installed")
else
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" bash -c \
      "set -o pipefail; compute-sanitizer --tool $tool --error-exitcode 1 --kernel-regex kns=vim4cuda '$python' tests/gpu/sanitize.py | tail -3"
  done
fi

for each in "${left_out[@]}"; do echo "left out  $each"; done
for each in "${passed[@]}"; do echo "passed    $each"; done
for each in "${failed[@]}"; do echo "FAILED    $each"; done
[ ${#failed[@]} = 0 ]
