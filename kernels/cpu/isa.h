// Which instruction set runs a kernel. Each is the same source compiled with other flags (kernels/CMakeLists.txt).
#ifndef VIM_CPU_ISA_H_
#define VIM_CPU_ISA_H_

#include <cstddef>
#include <cstdint>

#include "vim/add_rms_norm.h"
#include "vim/bi_causal_conv1d.h"
#include "vim/bi_selective_scan.h"
#include "vim/cpu.h"
#include "vim/selective_scan.h"

namespace vim::cpu {

constexpr int kLanes = 16;     // channels of a tile: fp32 in a 512-bit register, and in a cache line
constexpr int kMaxRows = 256;  // tiles of a task x states: also the most states, as vim_selective_scan_supports says
constexpr int kMaxTiles = 8;

// A call of each kernel, cut into tasks.

struct ScanSplit {
  int tiles_per_task;  // at most kMaxTiles; times states, at most kMaxRows
  int64_t tasks_per_group;
};

struct Scan {
  const vim_selective_scan_desc* desc;
  const vim_selective_scan_args* args;
  ScanSplit split;
};

// The forward scan leaves its output in y; the reverse one adds its own, gates, scales.
struct BiScan {
  vim_selective_scan_desc desc[2];
  vim_selective_scan_args args[2];
  const float* y_scale;  // null for none
  ScanSplit split;
};

struct BiConv {
  const vim_bi_causal_conv1d_desc* desc;
  const vim_bi_causal_conv1d_args* args;
  int64_t tokens_per_task, tasks_per_batch;
};

struct Norm {
  const vim_add_rms_norm_desc* desc;
  const vim_add_rms_norm_args* args;
  int64_t rows_per_task;
};

// What one instruction set runs: each function is task `index` of a call.
struct Kernels {
  void (*scan)(const Scan& scan, size_t index);
  void (*bi_scan)(const BiScan& scan, size_t index);
  void (*bi_conv)(const BiConv& conv, size_t index);
  void (*norm)(const Norm& norm, size_t index);
};

extern const Kernels kBaseline, kX86V3, kX86V4;

// Those to run on; null where the environment variable VIMDEPLOY_CPU_ISA names what is not to be had here.
const Kernels* ChosenKernels();

// Those of the instruction set of that name; null where this build or this processor lacks it.
const Kernels* FindKernels(const char* isa);

// Fewer operations than this, in multiplications and the like on single numbers, take less time than waking a thread
// pool.
constexpr double kSerialOperations = 1 << 18;

// Runs `kernel` for each task, on the pool where that is worth it.
template <typename Call>
void RunTasks(void (*kernel)(const Call&, size_t), const Call& call, size_t tasks, double operations,
              vim_parallel_for parallel_for, void* pool) {
  struct Job {
    void (*kernel)(const Call&, size_t);
    const Call* call;
  } job = {kernel, &call};
  const auto body = [](void* context, size_t index) {
    const Job& one = *static_cast<const Job*>(context);
    one.kernel(*one.call, index);
  };
  if (parallel_for == nullptr || tasks == 1 || operations < kSerialOperations) {
    for (size_t i = 0; i < tasks; ++i) body(&job, i);
  } else {
    parallel_for(pool, body, tasks, &job);
  }
}

}  // namespace vim::cpu

#endif  // VIM_CPU_ISA_H_
