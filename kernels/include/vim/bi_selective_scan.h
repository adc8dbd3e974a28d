/* Both directions of a Vim mixer's scan, summed, gated once:
 *
 *   y = (scan(u_f, delta_f, A_f, B_f, C_f, D_f, bias_f) + reverse scan(u_b, delta_b, A_b, B_b, C_b, D_b, bias_b))
 *       * silu(z) * y_scale
 *
 * Shapes, types and inner arithmetic are those of the single scan (selective_scan.h). Index 0 is the forward
 * direction, 1 the reverse one. Strides are in elements and may be those of slices: B and C are read straight from the
 * rows of x_proj's output with B = row + dt_rank, C = B + states, token stride dt_rank + 2 * states; z from the second
 * half of in_proj's rows.
 */
#ifndef VIM_BI_SELECTIVE_SCAN_H_
#define VIM_BI_SELECTIVE_SCAN_H_

#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vim_bi_selective_scan_desc {
  int64_t batch, length, channels, states, groups;
  int32_t io; /* vim_dtype of u, delta, B, C, z, y */
  int32_t delta_softplus;
  int32_t has_D, has_z, has_delta_bias, has_y_scale;
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
  const float* y_scale;       /* (channels) fp32; NULL unless has_y_scale */
  void* y;
} vim_bi_selective_scan_args;

/* Fill the strides of `desc` for contiguous u, delta, y, for B and C inside rows of `row` elements, where row is
 * dt_rank + 2 * groups * states, and z inside rows of `z_row` elements; 0 means tensors of their own. */
void vim_bi_selective_scan_contiguous(vim_bi_selective_scan_desc* desc, int64_t row, int64_t z_row);

/* 1 when a kernel exists, else 0 and the reason. */
int vim_bi_selective_scan_supports(const vim_bi_selective_scan_desc* desc, char* reason, size_t reason_size);

/* CPU. `parallel_for` may be NULL (runs on the calling thread). No allocation. Thread-safe. */
vim_status vim_bi_selective_scan_cpu(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                                     vim_parallel_for parallel_for, void* pool);

#ifdef __cplusplus
}
#endif

#endif /* VIM_BI_SELECTIVE_SCAN_H_ */
