/* Residual add and RMSNorm, row by row:
 *
 *   r_out = h + r;   n = r_out / sqrt(mean(r_out^2) + epsilon) * weight
 *
 * h, n (rows, channels) io type; r, r_out (rows, channels) fp32; weight (channels) fp32. All contiguous; r_out may be
 * r. Inside is fp32: the residual stream of a trained Vim leaves fp16's range when squared (vim-spec.md 7.3).
 */
#ifndef VIM_ADD_RMS_NORM_H_
#define VIM_ADD_RMS_NORM_H_

#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vim_add_rms_norm_desc {
  int64_t rows, channels;
  int32_t io; /* vim_dtype of h and n */
  float epsilon;
} vim_add_rms_norm_desc;

typedef struct vim_add_rms_norm_args {
  const void* h;
  const float* r;
  const float* weight;
  void* n;
  float* r_out;
} vim_add_rms_norm_args;

/* 1 when a kernel exists for `desc`; else 0 and a sentence in `reason` (always NUL-terminated; may be NULL). */
int vim_add_rms_norm_supports(const vim_add_rms_norm_desc* desc, char* reason, size_t reason_size);

/* CPU. `parallel_for` may be NULL (runs on the calling thread). No allocation. Thread-safe. */
vim_status vim_add_rms_norm_cpu(const vim_add_rms_norm_desc* desc, const vim_add_rms_norm_args* args,
                                vim_parallel_for parallel_for, void* pool);

/* CUDA: device pointers, enqueued on `stream` (a cudaStream_t); no allocation, no synchronisation. */
vim_status vim_add_rms_norm_cuda(const vim_add_rms_norm_desc* desc, const vim_add_rms_norm_args* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* VIM_ADD_RMS_NORM_H_ */
