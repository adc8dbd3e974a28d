// Stands in for onnxruntime_backend.cc where ONNX Runtime's headers were not found.
#include "backend.h"
#include "refuse.h"

namespace vimdeploy {

std::shared_ptr<const ModelImpl> OpenOnnx(const std::string& path, const OpenOptions&) {
  RefuseMissing(path + " needs ONNX Runtime, which this build of the vimdeploy library leaves out",
                "build it where ONNX Runtime's headers are found (ONNXRUNTIME_ROOT)");
}

std::string OnnxRuntimeFeature() { return ""; }

}  // namespace vimdeploy
