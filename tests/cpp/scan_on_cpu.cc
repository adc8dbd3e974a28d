// The CUDA scan on the CPU, one form at a time; tests/cuda_on_cpu.py builds it.
#include "cuda_on_cpu.h"
//
#include "cuda/generic.cuh"
#include "cuda/lanes.cuh"
#include "cuda/sequential.cuh"
#include "cuda/states.cuh"

namespace {

template <typename IO>
cudaError_t Launch(const vim::cuda::Params& params, const vim_scan_variant& variant) {
  switch (variant.form) {
    case VIM_SCAN_SEQUENTIAL:
      return vim::cuda::LaunchSequential<IO>(params, variant.channels, nullptr);
    case VIM_SCAN_LANES:
      return vim::cuda::LaunchLanes<IO>(params, variant, nullptr);
    case VIM_SCAN_STATES:
      return vim::cuda::LaunchStates<IO>(params, variant, 90, nullptr);
    default:
      return vim::cuda::LaunchGeneric<IO>(params, nullptr);
  }
}

}  // namespace

// 0; a cudaError_t; -1 for a block that is too large for any card.
extern "C" int scan(int half, const vim::cuda::Params* params, const vim_scan_variant* variant, int order) {
  emulated::order = order;
  const cudaError_t error = half ? Launch<__half>(*params, *variant) : Launch<float>(*params, *variant);
  return emulated::refused ? -1 : error;
}
