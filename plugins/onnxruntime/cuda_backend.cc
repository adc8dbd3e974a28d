// The ops on CUDA's execution provider: kernels on the provider's stream, nothing waited for, so that ONNX Runtime may
// record them into a CUDA graph.
#include <cuda_runtime_api.h>

#include "op.h"
#include "vim/selective_scan_cuda.h"

namespace vim::ort {
namespace {

template <auto kKernel, typename Desc, typename Args>
vim_status OnStream(const Desc& desc, const Args& args, const Ort::KernelContext& context) {
  return kKernel(&desc, &args, context.GetGPUComputeStream());
}

// Memory of the session's arena while a kernel is enqueued: whoever gets it next is enqueued after that kernel. None
// where there is none to be had, which a scan can do without.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, size_t bytes) {
    int device = 0;
    if (bytes == 0 || cudaGetDevice(&device) != cudaSuccess) return;
    const Ort::MemoryInfo memory("Cuda", OrtDeviceAllocator, device, OrtMemTypeDefault);
    allocator_ = context.GetAllocator(*static_cast<const OrtMemoryInfo*>(memory));
    data_ = allocator_->Alloc(allocator_, bytes);
  }
  ~Scratch() {
    if (data_ != nullptr) allocator_->Free(allocator_, data_);
    if (allocator_ != nullptr) Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

template <auto kKernel, auto kWorkspace, typename Desc, typename Args>
vim_status ScanOnStream(const Desc& desc, const Args& args, const Ort::KernelContext& context) {
  const Scratch scratch(context, kWorkspace(&desc));
  return kKernel(&desc, &args, scratch.data(), context.GetGPUComputeStream());
}

}  // namespace

const Backend kCuda = {
    "CUDAExecutionProvider",
    nullptr,
    vim_cuda_last_error,
    ScanOnStream<vim_selective_scan_cuda, vim_selective_scan_cuda_workspace>,
    ScanOnStream<vim_bi_selective_scan_cuda, vim_bi_selective_scan_cuda_workspace>,
    OnStream<vim_bi_causal_conv1d_cuda>,
    OnStream<vim_add_rms_norm_cuda>,
};

}  // namespace vim::ort
