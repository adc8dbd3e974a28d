// Nothing of libonnxruntime is linked: the runtime hands its own table of functions in (ORT_API_MANUAL_INIT, set for
// the whole target), so one library serves every ONNX Runtime from 1.21 on.
#include "register.h"

#include <cstdio>
#include <exception>
#include <string>

namespace vim::ort {
namespace {

const OrtApi* AnyApi(const OrtApiBase* base) {
  for (uint32_t version = kApiVersion; version > 0; --version)
    if (const OrtApi* api = base->GetApi(version)) return api;
  return nullptr;
}

// The 24 of "1.24.0".
int MinorVersion(const OrtApiBase* base) {
  int minor = 0;
  return std::sscanf(base->GetVersionString(), "1.%d", &minor) == 1 ? minor : 0;
}

// Sessions keep pointers to the domain and its ops, and may outlive any static's destruction: never freed.
OrtCustomOpDomain* MakeDomain(const OrtApiBase* base, const OrtApi* api,
                              std::initializer_list<const Backend*> backends) {
  const bool infer_shapes = MinorVersion(base) >= 24;
  Ort::InitApi(api);
  Ort::CustomOpDomain domain("vim");
  for (const auto io : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                        ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
                        // Not computed: registered so that our refusal is what the user reads.
                        ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE})
    for (const Op& op : kOps)
      for (const Backend* backend : backends) domain.Add(new CustomOp(op, *backend, io, infer_shapes));
  return domain.release();
}

}  // namespace

OrtStatus* Register(OrtSessionOptions* options, const OrtApiBase* base, const char* library,
                    std::initializer_list<const Backend*> backends) noexcept {
  const OrtApi* const api = base->GetApi(kApiVersion);
  try {
    if (api == nullptr) {
      const OrtApi* const older = AnyApi(base);
      if (older == nullptr) return nullptr;  // no way to say anything; the model will fail to find its op
      const std::string version = std::to_string(kApiVersion);
      const std::string message = std::string(library) + " needs ONNX Runtime 1." + version +
                                  " or newer (API version " + version + "); this one is " + base->GetVersionString() +
                                  ". Upgrade it: pip install --upgrade onnxruntime";
      return older->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
    }
    static OrtCustomOpDomain* const domain = MakeDomain(base, api, backends);
    return api->AddCustomOpDomain(options, domain);
  } catch (const std::exception& error) {
    return api != nullptr ? api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what()) : nullptr;
  }
}

}  // namespace vim::ort
