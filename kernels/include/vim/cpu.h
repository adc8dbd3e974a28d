/* Which instruction set the CPU kernels run on. Each is compiled for several; the choice is made as the program runs.
 */
#ifndef VIM_CPU_H_
#define VIM_CPU_H_

#include "vim/add_rms_norm.h"
#include "vim/bi_causal_conv1d.h"
#include "vim/bi_selective_scan.h"
#include "vim/selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The name of the instruction set that the kernels run on here: "baseline" ("neon" on 64-bit ARM), "x86-64-v3",
 * "x86-64-v4". The widest there is, or the one that the environment variable VIMDEPLOY_CPU_ISA names as the first
 * kernel runs; NULL, and every kernel returns VIM_UNSUPPORTED, where that one is not to be had here. */
const char* vim_cpu_isa(void);

/* Those to be had here, widest first; NULL past the last. */
const char* vim_cpu_isa_at(size_t index);

/* The kernels on the instruction set named; VIM_UNSUPPORTED where it is not to be had here. For tests and benchmarks.
 */
vim_status vim_selective_scan_cpu_isa(const char* isa, const vim_selective_scan_desc* desc,
                                      const vim_selective_scan_args* args, vim_parallel_for parallel_for, void* pool);
vim_status vim_bi_selective_scan_cpu_isa(const char* isa, const vim_bi_selective_scan_desc* desc,
                                         const vim_bi_selective_scan_args* args, vim_parallel_for parallel_for,
                                         void* pool);
vim_status vim_bi_causal_conv1d_cpu_isa(const char* isa, const vim_bi_causal_conv1d_desc* desc,
                                        const vim_bi_causal_conv1d_args* args, vim_parallel_for parallel_for,
                                        void* pool);
vim_status vim_add_rms_norm_cpu_isa(const char* isa, const vim_add_rms_norm_desc* desc,
                                    const vim_add_rms_norm_args* args, vim_parallel_for parallel_for, void* pool);

#ifdef __cplusplus
}
#endif

#endif /* VIM_CPU_H_ */
