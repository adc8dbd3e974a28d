// libvimdeploy_ort.so: the one function ONNX Runtime looks up in a custom-op library.
#include "register.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  return vim::ort::Register(options, base, "libvimdeploy_ort.so", {&vim::ort::kCpu});
}
