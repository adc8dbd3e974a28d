// libvimdeploy_ort_cuda.so: the ops for CUDA's execution provider, and the CPU's, since ONNX Runtime takes one library
// of a domain in a session.
#include "register.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  return vim::ort::Register(options, base, "libvimdeploy_ort_cuda.so", {&vim::ort::kCuda, &vim::ort::kCpu});
}
