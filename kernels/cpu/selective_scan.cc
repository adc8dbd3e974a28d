// The C interface of the CPU kernel: checks, the choice of instruction set, and the distribution of tasks.
#include "vim/selective_scan.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace {

using vim::cpu::Scan;

// Fewer state updates than this take less time than waking a thread pool.
constexpr double kSerialUpdates = 1 << 15;

struct Isa {
  const char* name;
  void (*run_task)(const Scan& scan, size_t index);
  bool (*available)();
};

// Fastest first.
constexpr Isa kIsas[] = {
#if defined(VIM_CPU_HAS_X86_V4)
    {"x86-64-v4", vim::cpu::RunTaskX86V4,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     }},
#endif
#if defined(VIM_CPU_HAS_X86_V3)
    {"x86-64-v3", vim::cpu::RunTaskX86V3,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
     }},
#endif
    {"baseline", vim::cpu::RunTaskBaseline, [] { return true; }},
};

const Isa& Best() {
  static const Isa& best = []() -> const Isa& {
    for (const Isa& isa : kIsas)
      if (isa.available()) return isa;
    return kIsas[sizeof kIsas / sizeof kIsas[0] - 1];
  }();
  return best;
}

// Neighbouring tiles share the loads of B and C and read longer pieces of each row: two rather than one are worth 4 %
// at 197 tokens, and four rather than two a fifth at 6085, where rows come from memory. But tasks are what threads
// share out, so there should be a few for each, and an even number of them at the usual sizes.
int TilesPerTask(const vim_selective_scan_desc& desc, int64_t tiles_per_group) {
  constexpr int64_t kTasks = 12;
  constexpr int64_t kLong = 1024;
  const int64_t spare = desc.batch * desc.groups * tiles_per_group / kTasks;
  const int64_t least = desc.length >= kLong ? 4 : 1;
  const int64_t fit = std::min<int64_t>(vim::cpu::kMaxTiles, vim::cpu::kMaxRows / desc.states);
  return static_cast<int>(std::min(std::max(spare, least), fit));
}

struct Job {
  Scan scan;
  const Isa* isa;
};

void Task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  job.isa->run_task(job.scan, index);
}

vim_status Run(const Isa& isa, const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
               vim_parallel_for parallel_for, void* pool) {
  if (!vim_selective_scan_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->batch == 0 || desc->length == 0) return VIM_OK;

  const int64_t tiles_per_group = (desc->channels / desc->groups + vim::cpu::kLanes - 1) / vim::cpu::kLanes;
  const int tiles_per_task = TilesPerTask(*desc, tiles_per_group);
  const int64_t tasks_per_group = (tiles_per_group + tiles_per_task - 1) / tiles_per_task;
  Job job = {{desc, args, tiles_per_task, tasks_per_group}, &isa};
  const size_t tasks = static_cast<size_t>(desc->batch * desc->groups * tasks_per_group);
  const double updates = static_cast<double>(desc->batch) * desc->channels * desc->length * desc->states;
  if (parallel_for == nullptr || tasks == 1 || updates < kSerialUpdates) {
    for (size_t i = 0; i < tasks; ++i) Task(&job, i);
  } else {
    parallel_for(pool, Task, tasks, &job);
  }
  return VIM_OK;
}

}  // namespace

extern "C" {

const char* vim_cpu_isa(void) { return Best().name; }

vim_status vim_selective_scan_cpu(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                  vim_parallel_for parallel_for, void* pool) {
  return Run(Best(), desc, args, parallel_for, pool);
}

vim_status vim_selective_scan_cpu_isa(const char* name, const vim_selective_scan_desc* desc,
                                      const vim_selective_scan_args* args, vim_parallel_for parallel_for, void* pool) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.available()) return Run(isa, desc, args, parallel_for, pool);
  return VIM_UNSUPPORTED;
}

}  // extern "C"
