/* The selective scan, as every runtime of vimdeploy calls it: pointers, sizes, strides, nothing of any runtime.
 *
 * Channel-last, as the linear layers around the scan write and read (docs/reference/selective-scan.md):
 *
 *   u, delta, z, y   (batch, length, channels)          io type
 *   B, C             (batch, length, groups, states)    io type
 *   A                (channels, states)                 fp32, negative
 *   D, delta_bias    (channels)                         fp32, optional (NULL)
 *
 * Inside everything is fp32, whatever the io type:
 *
 *   Delta = softplus(delta + delta_bias)           softplus(x) = x above 20
 *   s_t   = exp(Delta_t A) * s_prev + (Delta_t u_t) B_t      s = 0 before the first token
 *   y_t   = <C_t, s_t> + D u_t, then times z sigmoid(z)
 *
 * With `reverse` the scan runs from the last token to the first; outputs stay in place.
 * Channel d reads group d / (channels / groups) of B and C.
 */
#ifndef VIM_SELECTIVE_SCAN_H_
#define VIM_SELECTIVE_SCAN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vim_dtype { VIM_F32 = 0, VIM_F16 = 1, VIM_BF16 = 2 } vim_dtype;

typedef enum vim_status {
  VIM_OK = 0,
  VIM_UNSUPPORTED = 1,   /* the descriptor asks for what no kernel here does; see the reason */
  VIM_LAUNCH_FAILED = 2, /* CUDA refused the launch */
} vim_status;

/* What a scan is, without its data. Strides are in elements; the innermost stride is 1. */
typedef struct vim_selective_scan_desc {
  int64_t batch, length, channels, states, groups;
  int32_t io; /* vim_dtype of u, delta, B, C, z, y */
  int32_t delta_softplus, reverse;
  int32_t has_D, has_z, has_delta_bias;
  int64_t u_batch_stride, u_token_stride;
  int64_t delta_batch_stride, delta_token_stride;
  int64_t z_batch_stride, z_token_stride;
  int64_t B_batch_stride, B_token_stride, B_group_stride;
  int64_t C_batch_stride, C_token_stride, C_group_stride;
  int64_t y_batch_stride, y_token_stride;
} vim_selective_scan_desc;

typedef struct vim_selective_scan_args {
  const void* u;
  const void* delta;
  const float* A;
  const void* B;
  const void* C;
  const float* D;          /* NULL unless has_D */
  const void* z;           /* NULL unless has_z */
  const float* delta_bias; /* NULL unless has_delta_bias */
  void* y;
} vim_selective_scan_args;

/* Fill the strides of `desc` for tensors that are contiguous in the layout above. */
void vim_selective_scan_contiguous(vim_selective_scan_desc* desc);

/* 1 when a kernel exists for `desc`; else 0 and a sentence in `reason` (always NUL-terminated).
 * The one place that says what is supported: plugins, runtimes, builders and the docs ask it. */
int vim_selective_scan_supports(const vim_selective_scan_desc* desc, char* reason, size_t reason_size);

/* Runs `body(context, i)` for i in [0, count), in any order, possibly on several threads. */
typedef void (*vim_parallel_for)(void* pool, void (*body)(void* context, size_t index), size_t count, void* context);

/* CPU. `parallel_for` may be NULL (runs on the calling thread). No allocation. Thread-safe. */
vim_status vim_selective_scan_cpu(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                  vim_parallel_for parallel_for, void* pool);

#ifdef __cplusplus
}
#endif

#endif /* VIM_SELECTIVE_SCAN_H_ */
