#!/usr/bin/env bash
# INT8 on TensorRT 8.5.3.1 and a card: accuracy of the shipped model, with and without outlier channels, and speed and
# size of Vim-S and Vim-B against fp16.
#
#   tests/gpu/int8_trt85.sh PLUGIN RESULTS.json [STEP ...]      steps: see int8_trt85.py
#
# TRT_PYTHON   a Python with TensorRT 8.5, numpy < 1.24, onnx, onnx-ir; its libraries on LD_LIBRARY_PATH
# PYTHON       a Python with torch, onnx, onnx-ir and pillow (python3); the two need not be one
# WORK         where exports and plans go (a new folder); what lies there from an earlier run is used again
set -euo pipefail
plugin=$(realpath "${1:?plugin library}") results=$(realpath -m "${2:?results file}")
shift 2
[ $# -gt 0 ] || set -- digits outliers outliers-naive naive vim_small vim_base
cd "$(dirname "$0")/../.."
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
missing=()
for step in "$@"; do
  case $step in vim_*) name=$step ;; *) name=digits ;; esac
  [ -f "$work/$name.vim/model.onnx" ] || [[ " ${missing[*]-} " == *" $name "* ]] || missing+=("$name")
done
[ ${#missing[@]} -eq 0 ] ||
  env -u LD_LIBRARY_PATH "${PYTHON:-python3}" tests/gpu/int8_reference.py "$work" "${missing[@]}"
"${TRT_PYTHON:?}" tests/gpu/int8_trt85.py "$work" "$plugin" "$results" "$@"
