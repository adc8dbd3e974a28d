// The ops on CUDA's execution provider: kernels on the provider's stream, nothing waited for, so that ONNX Runtime may
// record them into a CUDA graph.
#include "op.h"
#include "vim/selective_scan_cuda.h"

namespace vim::ort {
namespace {

template <auto kKernel, typename Desc, typename Args>
vim_status OnStream(const Desc& desc, const Args& args, const Ort::KernelContext& context) {
  return kKernel(&desc, &args, context.GetGPUComputeStream());
}

// The scans, without the workspace in which a long one would be cut: what a custom op takes of a session's arena is
// anyone's once it is given back, and runs of other threads have other streams.
template <auto kKernel, typename Desc, typename Args>
vim_status ScanOnStream(const Desc& desc, const Args& args, const Ort::KernelContext& context) {
  return kKernel(&desc, &args, nullptr, context.GetGPUComputeStream());
}

}  // namespace

const Backend kCuda = {
    "CUDAExecutionProvider",
    nullptr,
    vim_cuda_last_error,
    ScanOnStream<vim_selective_scan_cuda>,
    ScanOnStream<vim_bi_selective_scan_cuda>,
    OnStream<vim_bi_causal_conv1d_cuda>,
    OnStream<vim_add_rms_norm_cuda>,
};

}  // namespace vim::ort
