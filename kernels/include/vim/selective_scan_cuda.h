/* The selective scan on CUDA, and the fused form of both directions.
 *
 * Every function here takes device pointers, allocates nothing, synchronises nothing, and enqueues on the stream it
 * is given, so all of them may be captured into a CUDA graph. They act on the calling thread's current device.
 */
#ifndef VIM_SELECTIVE_SCAN_CUDA_H_
#define VIM_SELECTIVE_SCAN_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#include "vim/bi_selective_scan.h"
#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One direction. `stream` is a cudaStream_t. `workspace` holds vim_selective_scan_cuda_workspace(desc) bytes, 256-byte
 * aligned; without one (NULL) the results are the same, and long sequences of few channels take longer. Outputs must
 * not overlap inputs. What a larger batch asks for need not be enough for a smaller one: large ones need none.
 * Returns VIM_UNSUPPORTED where vim_selective_scan_supports says no, VIM_LAUNCH_FAILED where CUDA refuses the launch
 * (vim_cuda_last_error names it). Thread-safe. */
vim_status vim_selective_scan_cuda(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                   void* workspace, void* stream);
size_t vim_selective_scan_cuda_workspace(const vim_selective_scan_desc* desc);

/* Both directions (bi_selective_scan.h). The sum is formed in y, so one direction's part is rounded once to the io type
 * before the other is added. */
vim_status vim_bi_selective_scan_cuda(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                                      void* workspace, void* stream);
size_t vim_bi_selective_scan_cuda_workspace(const vim_bi_selective_scan_desc* desc);

/* Which kernel runs. The choice is a pure function of the sizes and of the SM (90 for sm_90); tests and benchmarks may
 * force one. A forced variant that cannot serve the descriptor returns VIM_UNSUPPORTED. */
typedef enum vim_scan_form {
  VIM_SCAN_GENERIC = 0,    /* any states, groups, strides; one warp a row */
  VIM_SCAN_SEQUENTIAL = 1, /* channels across threads, 16 states in registers */
  VIM_SCAN_LANES = 2,      /* a row's tokens across the lanes of a warp */
  VIM_SCAN_STATES = 3,     /* a row's states across lanes, the rest in helper warps */
} vim_scan_form;

typedef struct vim_scan_variant {
  int32_t form;     /* vim_scan_form */
  int32_t channels; /* sequential: channels a thread (1, 2); lanes, states: channels a block */
  int32_t lanes;    /* lanes, states: lanes a row */
  int32_t tokens;   /* lanes: tokens a lane (13, 16); states: tokens a tile */
  int32_t split;    /* lanes: warps that share a row's states (1, 2, 4); states: tokens of a tile a helper thread has */
  int32_t apart;    /* lanes: 1 = the two directions are two blocks of a cluster (sm_90 and later); states: 1 = B and C
                       have helper warps of their own */
  int32_t rows;     /* states: rows that a lane walks side by side (1, 2, 3) */
  int32_t chunks;   /* states: parts of the sequence that are scanned side by side, after a launch that works out what
                       states each begins with; 1: none. Above 1 only with a workspace. */
} vim_scan_variant;

vim_scan_variant vim_selective_scan_choose_variant(const vim_selective_scan_desc* desc, int sm);
vim_scan_variant vim_bi_selective_scan_choose_variant(const vim_bi_selective_scan_desc* desc, int sm);

vim_status vim_selective_scan_cuda_with(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                        const vim_scan_variant* variant, void* workspace, void* stream);
vim_status vim_bi_selective_scan_cuda_with(const vim_bi_selective_scan_desc* desc,
                                           const vim_bi_selective_scan_args* args, const vim_scan_variant* variant,
                                           void* workspace, void* stream);

/* The CUDA error behind the calling thread's last VIM_LAUNCH_FAILED, in words. */
const char* vim_cuda_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* VIM_SELECTIVE_SCAN_CUDA_H_ */
