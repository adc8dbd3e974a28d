// The CUDA convolution and norm on the CPU, behind their own C interface; tests/cuda_on_cpu.py builds it.
#include "cuda_on_cpu.h"
//
#include "cuda/add_rms_norm.cu"
#include "cuda/bi_causal_conv1d.cu"

vim_status vim::cuda::StatusOf(cudaError_t error) { return error == cudaSuccess ? VIM_OK : VIM_LAUNCH_FAILED; }

extern "C" void set_order(int order) { emulated::order = order; }
