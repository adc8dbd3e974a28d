#!/usr/bin/env bash
# onnxruntime-gpu on a card: vimdeploy's CUDA ops alone and in the shipped digits model and Vim-Ti, fused and not, fp32 and
# fp16, at batch 1, 7 and 64, against what PyTorch computes; CUDA graphs, overhead, bad input.
#
#   tests/gpu/ort_cuda.sh LIBRARY RESULTS.json [NAME:FUSION:PRECISION ...]
#
# LIBRARY is libvimdeploy_ort_cuda.so; with libvimdeploy_ort.so beside it, that is tried too, and must be refused.
# PYTHON   a Python with onnxruntime-gpu, torch, onnx, onnx-ir and pillow (python3)
# WORK     where exports and references go (a new folder)
set -euo pipefail
library=$(realpath "${1:?op library}") results=$(realpath -m "${2:?results file}")
shift 2
if [ $# -eq 0 ]; then
  for fusion in none full; do for precision in fp32 fp16; do
    set -- "$@" "digits:$fusion:$precision" "vim_tiny:$fusion:$precision"
  done; done
fi
cd "$(dirname "$0")/../.."
work=${WORK:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -f "$work/vim_tiny.json" ] || "${PYTHON:-python3}" tests/gpu/trt85_reference.py "$work" digits vim_tiny
"${PYTHON:-python3}" tests/gpu/ort_cuda.py "$work" "$library" "$results" "$@"
