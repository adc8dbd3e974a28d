#include "cuda/status.h"

#include "vim/selective_scan_cuda.h"

namespace {

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

namespace vim::cuda {

vim_status StatusOf(cudaError_t error) {
  last_error = error;
  return error == cudaSuccess ? VIM_OK : VIM_LAUNCH_FAILED;
}

}  // namespace vim::cuda

extern "C" const char* vim_cuda_last_error(void) { return cudaGetErrorString(last_error); }
