// The choice of a CUDA kernel, which is host code, through C. tests/kernels/test_choose_variant.py builds and asks it.
#include "cuda/choose_variant.h"

extern "C" void choose(const vim::cuda::Sizes* sizes, int sm, vim_scan_variant* chosen) {
  *chosen = vim::cuda::Choose(*sizes, sm);
}

extern "C" int can_run(const vim_scan_variant* variant, const vim::cuda::Sizes* sizes, int sm) {
  return vim::cuda::CanRun(*variant, *sizes, sm);
}

extern "C" size_t workspace(int64_t rows, int64_t length, int64_t states) {
  return vim::cuda::StatesSizes::Workspace(rows, length, states);
}
