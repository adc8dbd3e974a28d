#!/usr/bin/env bash
# TensorRT 8.5.3.1 on a card: builds fp32 and fp16 plans of the shipped digits model, Vim-Ti and Vim-S with the plugin,
# runs them at batch 1, 7 and 64, and holds them against what PyTorch computes.
#
#   tests/gpu/trt85.sh PLUGIN RESULTS.json [NAME:PRECISION ...]
#
# TRT_PYTHON   a Python with TensorRT 8.5, numpy < 1.24, onnx, onnx-ir, pillow; its libraries on LD_LIBRARY_PATH
# PYTHON       a Python with torch, triton, onnx and onnx-ir (python3); the two need not be one
# WORK         where exports, references and plans go (a new folder)
set -euo pipefail
plugin=$(realpath "${1:?plugin library}") results=$(realpath -m "${2:?results file}")
shift 2
[ $# -gt 0 ] || set -- digits:fp32 digits:fp16 vim_tiny:fp16 vim_tiny:fp32 vim_small:fp16 vim_small:fp32
cd "$(dirname "$0")/../.."
work=${WORK:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -f "$work/vim_small.json" ] || env -u LD_LIBRARY_PATH "${PYTHON:-python3}" tests/gpu/trt85_reference.py "$work"
"${TRT_PYTHON:?}" tests/gpu/trt85.py "$work" "$plugin" "$results" "$@"
