// The .json beside a plan (vimdeploy/engines/sidecar.py writes it): what the plan was built for.
#ifndef VIMDEPLOY_SDK_SIDECAR_H_
#define VIMDEPLOY_SDK_SIDECAR_H_

#include <map>
#include <string>

namespace vimdeploy {

struct Sidecar {
  std::string path;
  std::string plan_sha256;
  std::string tensorrt;  // version: "10.14.1.48"
  bool version_compatible = false;
  int sm = 0;
  std::string plugin;  // path; "" for a plan without one
  std::string plugin_sha256;
  std::map<std::string, std::string> props;  // as of the ONNX file
};

// `model.fp16.plan` -> `model.fp16.plan.json`. Throws kInput when it is missing, damaged, or of another kind of engine.
Sidecar ReadSidecar(const std::string& plan);

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_SIDECAR_H_
