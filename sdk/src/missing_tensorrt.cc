// Stands in for tensorrt_backend.cc where TensorRT's headers were not found.
#include "backend.h"
#include "refuse.h"

namespace vimdeploy {

std::shared_ptr<const ModelImpl> OpenPlan(const std::string& path, const OpenOptions&) {
  RefuseMissing(path + " needs TensorRT, which this build of the vimdeploy library leaves out",
                "build it where the headers of TensorRT and CUDA are found (TENSORRT_ROOT, CUDA_HOME)");
}

std::string TensorRtFeature() { return ""; }

}  // namespace vimdeploy
