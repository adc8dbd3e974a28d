// Which instruction set runs a kernel. Each is the same source compiled with other flags (kernels/CMakeLists.txt).
#ifndef VIM_CPU_ISA_H_
#define VIM_CPU_ISA_H_

#include <cstddef>
#include <cstdint>

#include "vim/selective_scan.h"

namespace vim::cpu {

constexpr int kLanes = 16;     // channels of a tile: fp32 in a 512-bit register, and in a cache line
constexpr int kMaxRows = 256;  // tiles of a task x states: also the most states, as vim_selective_scan_supports says
constexpr int kMaxTiles = 8;

struct Scan {
  const vim_selective_scan_desc* desc;
  const vim_selective_scan_args* args;
  int tiles_per_task;  // at most kMaxTiles; times states, at most kMaxRows
  int64_t tasks_per_group;
};

void RunTaskBaseline(const Scan& scan, size_t index);
void RunTaskX86V3(const Scan& scan, size_t index);
void RunTaskX86V4(const Scan& scan, size_t index);

}  // namespace vim::cpu

extern "C" {

/* The name of the instruction set that vim_selective_scan_cpu runs on here: "baseline", "x86-64-v3", "x86-64-v4". */
const char* vim_cpu_isa(void);

/* vim_selective_scan_cpu on the instruction set named; VIM_UNSUPPORTED where this build or this processor lacks it.
 * For tests and benchmarks. */
vim_status vim_selective_scan_cpu_isa(const char* isa, const vim_selective_scan_desc* desc,
                                      const vim_selective_scan_args* args, vim_parallel_for parallel_for, void* pool);
}

#endif  // VIM_CPU_ISA_H_
