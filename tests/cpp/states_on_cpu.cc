// The states form of the scan (kernels/cuda/states.cuh) on the CPU; tests/kernels/test_states_on_cpu.py builds it, from
// a copy of the headers in which the launch and two instructions are replaced.
#include "cuda_on_cpu.h"
//
#include "cuda/states.cuh"

extern "C" int scan_states(int half, const vim::cuda::Params* params, const vim_scan_variant* variant, int order) {
  emulated::order = order;
  return half ? vim::cuda::LaunchStates<__half>(*params, *variant, nullptr)
              : vim::cuda::LaunchStates<float>(*params, *variant, nullptr);
}
