// From CUDA's errors to the C interface's.
#ifndef VIM_KERNELS_CUDA_STATUS_H_
#define VIM_KERNELS_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "vim/selective_scan.h"

namespace vim::cuda {

// VIM_OK, or VIM_LAUNCH_FAILED with `error` kept for the calling thread's vim_cuda_last_error.
vim_status StatusOf(cudaError_t error);

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_STATUS_H_
