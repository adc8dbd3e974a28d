// What Model and Context ask of a runtime. One implementation a runtime; neither knows the other.
#ifndef VIMDEPLOY_SDK_BACKEND_H_
#define VIMDEPLOY_SDK_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "vimdeploy/vimdeploy.h"

namespace vimdeploy {

// A context's half of the runtime. Calls come from one thread at a time, with a batch that the model takes.
class ContextImpl {
 public:
  virtual ~ContextImpl() = default;
  // Fills `outputs`, reusing its memory.
  virtual void Run(const float* images, std::int64_t batch, std::vector<Tensor>* outputs) = 0;
  virtual void Enqueue(const void* images, std::int64_t batch, const std::vector<void*>& outputs, void* stream) = 0;
};

// An open model. Immutable, so shared between threads.
class ModelImpl {
 public:
  virtual ~ModelImpl() = default;
  virtual std::unique_ptr<ContextImpl> NewContext(void* stream) const = 0;

  ModelInfo info;
  std::string notice;
  std::string runtime;
  std::int64_t min_batch = 1;
  std::int64_t max_batch = 1;
};

std::shared_ptr<const ModelImpl> OpenOnnx(const std::string& path, const OpenOptions& options);
std::shared_ptr<const ModelImpl> OpenPlan(const std::string& path, const OpenOptions& options);

// For Features(); "" when the backend was not built.
std::string OnnxRuntimeFeature();
std::string TensorRtFeature();

// The input's shape as the runtime gives it, sizes left open as -1, against what the metadata says. Throws kInput.
// Returns the batch, or -1 when it is open.
std::int64_t CheckInputShape(const std::vector<std::int64_t>& shape, const ModelInfo& info, const std::string& path);

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_BACKEND_H_
