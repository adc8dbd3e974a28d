#!/usr/bin/env bash
# The C++ library against TensorRT on a card.
#
#   sdk.sh build OUT ONNX IMAGE...    on a host that compiles: programs with libjpeg and libpng inside, for the TensorRT of
#                                     TENSORRT_ROOT; and what ONNX Runtime (VIMDEPLOY_ONNXRUNTIME) sees in the images
#   sdk.sh run OUT PLAN               on the host with the card: the same classes from the plan, by one thread and by four,
#                                     in batches and one by one; and each refusal
#
# PLAN is `vimdeploy build-engine`'s, of the same ONNX, its .json beside it. VIMDEPLOY_TENSORRT and VIMDEPLOY_TRT_PLUGIN
# say where libraries lie that are not where the loader or the .json look. TOLERANCE (1e-3) bounds the difference of
# probabilities: take 1e-2 for fp16.
set -euo pipefail
step=${1:?build or run}
mkdir -p "${2:?output folder}"
out=$(realpath "$2")
root=$(cd "$(dirname "$0")/../.." && pwd)

build() {
  local onnx source static=() library
  onnx=$(realpath "$1")
  shift
  # The host with the card may have neither.
  for library in JPEG=libjpeg PNG=libpng ZLIB=libz; do
    static+=("-D${library%=*}_LIBRARY=$(g++ -print-file-name="${library#*=}.a")")
  done
  cmake -S "$root" -B "$out/build" -DVIMDEPLOY_BUILD_SDK=ON -DBUILD_SHARED_LIBS=OFF "${static[@]}"
  cmake --build "$out/build" --parallel
  cmake --install "$out/build" --prefix "$out/prefix" --component sdk
  for source in "$root/tests/cpp/sdk" "$out/prefix/share/vimdeploy/examples"; do
    cmake -S "$source" -B "$out/$(basename "$source")" -DCMAKE_PREFIX_PATH="$out/prefix" "${static[@]}" \
      -DCMAKE_EXE_LINKER_FLAGS="-static-libstdc++ -static-libgcc"
    cmake --build "$out/$(basename "$source")"
  done
  cp "$out/sdk/sdk_check" "$out/examples/classify_ort" "$out/examples/classify_trt" "$out/"
  mkdir -p "$out/images"
  cp "$@" "$out/images/"
  export VIMDEPLOY_ORT_LIBRARY=$out/prefix/lib/libvimdeploy_ort.so
  (cd "$out" && ./sdk_check classify "$onnx" 5 images/* >expected.txt)
  (cd "$out" && for image in images/*; do ./classify_ort "$image" "$onnx"; done >printed.txt)
  wc -l "$out/expected.txt" "$out/printed.txt"
}

# same_classes FILE: the classes and probabilities of expected.txt, in its order.
same_classes() {
  python3 - "$1" "${TOLERANCE:-1e-3}" <<'EOF'
import sys
def rows(path):
    return [line.rstrip("\n").split(" ", 2) for line in open(path)]
got, want = rows(sys.argv[1]), rows("expected.txt")
assert len(got) == len(want) > 0, (len(got), len(want))
worst = max(abs(float(a[1]) - float(b[1])) for a, b in zip(got, want))
assert worst <= float(sys.argv[2]), worst
# Neighbours closer than the tolerance may change places.
moved = sum(a[0] != b[0] for a, b in zip(got, want))
first = sum(a[0] != b[0] for a, b in zip(got[::5], want[::5]))
assert first == 0 and moved <= len(want) // 50, (first, moved)
print(f"{sys.argv[1]}: {len(got) // 5} images, largest difference of a probability {worst:.1e}, {moved} of {len(got)} moved")
EOF
}

# refuses CODE TEXT COMMAND...
refuses() {
  local code=$1 text=$2 status=0
  shift 2
  "$@" >/dev/null 2>refusal.txt || status=$?
  if [ "$status" != "$code" ] || ! grep -q "$text" refusal.txt; then
    echo "exit $status instead of $code, or not \"$text\":" >&2
    cat refusal.txt >&2
    exit 1
  fi
  echo "refused: $(head -n 1 refusal.txt)"
}

run() {
  local plan
  plan=$(realpath "$1")
  cd "$out"
  ./sdk_check info "$plan"
  ./sdk_check classify "$plan" 5 images/* >batched.txt
  same_classes batched.txt
  for image in images/*; do ./sdk_check classify "$plan" 5 "$image"; done >single.txt
  same_classes single.txt
  ./sdk_check threads "$plan" 4 200 images/*
  # From recorded graphs: a large batch, then small ones, then by four threads with a context each.
  OPEN_GRAPH=1 ./sdk_check classify "$plan" 5 images/* >graph.txt
  cmp graph.txt batched.txt
  OPEN_GRAPH=1 ./sdk_check threads "$plan" 4 200 images/*
  for image in images/*; do ./classify_trt "$image" "$plan"; done >printed_trt.txt
  diff printed.txt printed_trt.txt && echo "classify_trt prints what classify_ort prints" ||
    echo "classify_trt differs from classify_ort as above: digits that round apart, or a fault; see batched.txt"

  local bad
  bad=$(mktemp -d)
  cp "$plan" "$bad/m.plan"
  refuses 2 "has no m.plan.json" ./sdk_check info "$bad/m.plan"
  cp "$plan.json" "$bad/m.plan.json"
  truncate -s -1 "$bad/m.plan"
  refuses 2 "SHA-256 differs" ./sdk_check info "$bad/m.plan"
  cp "$plan" "$bad/m.plan"
  sed 's/"sm": *[0-9]*/"sm": 1/' "$plan.json" >"$bad/m.plan.json"
  refuses 2 "was built for sm_1;" ./sdk_check info "$bad/m.plan"
  sed '/"plugin"/,/}/s/"sha256": *"[0-9a-f]*"/"sha256": "00"/' "$plan.json" >"$bad/m.plan.json"
  refuses 3 "is not the plugin library that" ./sdk_check info "$bad/m.plan"
  cp "$plan.json" "$bad/m.plan.json"
  refuses 3 "is not there" env OPEN_PLUGIN="$bad/none.so" ./sdk_check info "$bad/m.plan"
  refuses 2 "a batch of 100000" ./sdk_check run "$bad/m.plan" 100000
  rm -r "$bad"
  echo "sdk.sh: all passed"
}

shift 2
"$step" "$@"
