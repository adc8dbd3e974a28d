/* The short causal depthwise convolution of a Vim mixer in both directions, and SiLU:
 *
 *   u[0][t] = silu(bias[0] + sum_k weight[0][k] x[t - (taps - 1) + k])      forward: sees the past
 *   u[1][t] = silu(bias[1] + sum_k weight[1][k] x[t + (taps - 1) - k])      backward: sees the future
 *
 * x (batch, length, channels) io type, strided: the first half of in_proj's output rows; weight (taps, channels) and
 * bias (channels) fp32; u (batch, length, channels) io type, contiguous. Outside the sequence x is 0. Inside is fp32.
 */
#ifndef VIM_BI_CAUSAL_CONV1D_H_
#define VIM_BI_CAUSAL_CONV1D_H_

#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Strides are in elements; the innermost stride is 1. */
typedef struct vim_bi_causal_conv1d_desc {
  int64_t batch, length, channels, taps;
  int32_t io; /* vim_dtype of x and u */
  int64_t x_batch_stride, x_token_stride;
} vim_bi_causal_conv1d_desc;

typedef struct vim_bi_causal_conv1d_args {
  const void* x;
  const float* weight[2];
  const float* bias[2];
  void* u[2];
} vim_bi_causal_conv1d_args;

/* 1 when a kernel exists for `desc`; else 0 and a sentence in `reason` (always NUL-terminated; may be NULL). */
int vim_bi_causal_conv1d_supports(const vim_bi_causal_conv1d_desc* desc, char* reason, size_t reason_size);

/* CPU. `parallel_for` may be NULL (runs on the calling thread). No allocation. Thread-safe. */
vim_status vim_bi_causal_conv1d_cpu(const vim_bi_causal_conv1d_desc* desc, const vim_bi_causal_conv1d_args* args,
                                    vim_parallel_for parallel_for, void* pool);

/* CUDA: device pointers, enqueued on `stream` (a cudaStream_t); no allocation, no synchronisation. */
vim_status vim_bi_causal_conv1d_cuda(const vim_bi_causal_conv1d_desc* desc, const vim_bi_causal_conv1d_args* args,
                                     void* stream);

#ifdef __cplusplus
}
#endif

#endif /* VIM_BI_CAUSAL_CONV1D_H_ */
