/* The selective scan on CUDA, and the fused form of both directions.
 *
 * Every function here takes device pointers, allocates nothing, synchronises nothing, and enqueues on the stream it
 * is given, so all of them may be captured into a CUDA graph. They act on the calling thread's current device.
 */
#ifndef VIM_SELECTIVE_SCAN_CUDA_H_
#define VIM_SELECTIVE_SCAN_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One direction. `stream` is a cudaStream_t. `workspace` holds vim_selective_scan_cuda_workspace(desc) bytes, 256-byte
 * aligned; NULL when that is 0. Outputs must not overlap inputs.
 * Returns VIM_UNSUPPORTED where vim_selective_scan_supports says no, VIM_LAUNCH_FAILED where CUDA refuses the launch
 * (vim_cuda_last_error names it). Thread-safe. */
vim_status vim_selective_scan_cuda(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                   void* workspace, void* stream);
size_t vim_selective_scan_cuda_workspace(const vim_selective_scan_desc* desc);

/* Both directions of one layer, summed, gated once, scaled:
 *
 *   y = (scan(u_f, delta_f, A_f, B_f, C_f, D_f, bias_f) + reverse scan(u_b, delta_b, A_b, B_b, C_b, D_b, bias_b))
 *       * silu(z) * output_scale
 *
 * Shapes, types and inner arithmetic are those of the single scan (selective_scan.h). Index 0 is the forward
 * direction, 1 the reverse one. Strides are in elements and may be those of slices: B and C are read straight from the
 * rows of x_proj's output with B = row + dt_rank, C = B + states, token stride dt_rank + 2 * states.
 * The sum is formed in y, so one direction's part is rounded once to the io type before the other is added. */
typedef struct vim_bi_selective_scan_desc {
  int64_t batch, length, channels, states, groups;
  int32_t io; /* vim_dtype of u, delta, B, C, z, y */
  int32_t delta_softplus;
  int32_t has_D, has_z, has_delta_bias;
  float output_scale; /* 1 for none */
  int64_t u_batch_stride[2], u_token_stride[2];
  int64_t delta_batch_stride[2], delta_token_stride[2];
  int64_t B_batch_stride[2], B_token_stride[2], B_group_stride[2];
  int64_t C_batch_stride[2], C_token_stride[2], C_group_stride[2];
  int64_t z_batch_stride, z_token_stride;
  int64_t y_batch_stride, y_token_stride;
} vim_bi_selective_scan_desc;

typedef struct vim_bi_selective_scan_args {
  const void* u[2];
  const void* delta[2];
  const float* A[2];
  const void* B[2];
  const void* C[2];
  const float* D[2];          /* NULL unless has_D */
  const float* delta_bias[2]; /* NULL unless has_delta_bias */
  const void* z;              /* NULL unless has_z */
  void* y;
} vim_bi_selective_scan_args;

/* Fill the strides of `desc` for contiguous u, delta, z, y and for B and C inside rows of `row` elements, where row is
 * dt_rank + 2 * groups * states; row = 0 means B and C are tensors of their own. */
void vim_bi_selective_scan_contiguous(vim_bi_selective_scan_desc* desc, int64_t row);

/* 1 when a kernel exists, else 0 and the reason. */
int vim_bi_selective_scan_supports(const vim_bi_selective_scan_desc* desc, char* reason, size_t reason_size);

vim_status vim_bi_selective_scan_cuda(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                                      void* workspace, void* stream);
size_t vim_bi_selective_scan_cuda_workspace(const vim_bi_selective_scan_desc* desc);

/* Which kernel runs. The choice is a pure function of the sizes and of the SM (90 for sm_90); tests and benchmarks may
 * force one. A forced variant that cannot serve the descriptor returns VIM_UNSUPPORTED. */
typedef enum vim_scan_form {
  VIM_SCAN_GENERIC = 0,    /* any states, groups, strides; one warp a row */
  VIM_SCAN_SEQUENTIAL = 1, /* channels across threads, 16 states in registers */
  VIM_SCAN_LANES = 2,      /* a row's tokens across the lanes of a warp */
} vim_scan_form;

typedef struct vim_scan_variant {
  int32_t form;     /* vim_scan_form */
  int32_t channels; /* sequential: channels a thread (1, 2); lanes: channels a block */
  int32_t lanes;    /* lanes: lanes a row (8, 16, 32) */
  int32_t tokens;   /* lanes: tokens a lane (7, 13, 16) */
  int32_t split;    /* lanes: warps that share a row's states (1, 2, 4) */
  int32_t cluster;  /* lanes: 1 = the two directions are two blocks of a cluster (sm_90 and later) */
} vim_scan_variant;

vim_scan_variant vim_selective_scan_choose_variant(const vim_selective_scan_desc* desc, int sm);
vim_scan_variant vim_bi_selective_scan_choose_variant(const vim_bi_selective_scan_desc* desc, int sm);

vim_status vim_selective_scan_cuda_with(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                        const vim_scan_variant* variant, void* stream);
vim_status vim_bi_selective_scan_cuda_with(const vim_bi_selective_scan_desc* desc,
                                           const vim_bi_selective_scan_args* args, const vim_scan_variant* variant,
                                           void* stream);

/* The CUDA error behind the calling thread's last VIM_LAUNCH_FAILED, in words. */
const char* vim_cuda_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* VIM_SELECTIVE_SCAN_CUDA_H_ */
