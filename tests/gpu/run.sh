#!/usr/bin/env bash
# Builds the CUDA scan and runs tests/gpu on a host with a card, nvcc, torch and pytest.
#   tests/gpu/run.sh [pytest arguments]        CUDA_ARCH=90  SANITIZE=0 leaves compute-sanitizer out
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=${CUDA_ARCH:-90}
out=build/gpu
mkdir -p $out
flags="-std=c++17 -O3 -gencode arch=compute_$arch,code=sm_$arch -Ikernels -Ikernels/include -Xcompiler -fPIC"
objects=()
pids=()
for source in kernels/cuda/*.cu kernels/cuda/*.cc kernels/common/*.cc; do
  object=$out/$(basename "$source").o
  nvcc $flags -c "$source" -o "$object" &
  pids+=($!)
  objects+=("$object")
done
for pid in "${pids[@]}"; do wait "$pid"; done
nvcc -shared -cudart static "${objects[@]}" -o $out/libvimcuda.so
python3 -m pytest -q -p no:cacheprovider -c /dev/null --rootdir=tests/gpu tests/gpu "$@"
if [ "${SANITIZE:-1}" = 1 ]; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 --kernel-regex kns=Scan python3 tests/gpu/sanitize.py | tail -3
  done
fi
