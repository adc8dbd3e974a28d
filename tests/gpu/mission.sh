#!/usr/bin/env bash
# The three commands a user types, one after another in an empty folder, then the plan's answer to an image.
#
#   mission.sh CHECKPOINT PLUGIN IMAGE OUT
#
# PYTHON       a Python with torch and onnxruntime (python3)
# TRT_PYTHON   a Python with TensorRT; where it is another one, parity is taken against a reference file of the first
# ENGINE       further options of build-engine
set -euo pipefail
checkpoint=$(realpath "${1:?checkpoint}") plugin=$(realpath "${2:?plugin library}") image=$(realpath "${3:?image}")
mkdir -p "${4:?output folder}"
out=$(realpath "$4")
export PYTHONPATH="$(cd "$(dirname "$0")/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
cd "$(mktemp -d)"
python() { env -u LD_LIBRARY_PATH "${PYTHON:-python3}" -m vimdeploy "$@"; }
trt() { "${TRT_PYTHON:?}" -m vimdeploy "$@"; }

python export "$checkpoint" --no-verify
python verify parity --runtime onnxruntime-body --save-reference "$out/reference.npz"
# shellcheck disable=SC2086
trt build-engine --fp16 --plugin "$plugin" ${ENGINE:-}
trt verify parity --runtime tensorrt --plugin "$plugin" --reference "$out/reference.npz" --json >"$out/parity.json"
trt verify parity --runtime tensorrt --plugin "$plugin" --reference "$out/reference.npz"
trt run ./*.vim/model.fp16.plan "$image" | tee "$out/top5.txt"
cp ./*.vim/model.fp16.plan* "$out/"
