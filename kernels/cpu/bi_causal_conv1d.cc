// The C interface of the short convolution: checks, and the distribution of tasks.
#include "vim/bi_causal_conv1d.h"

#include <algorithm>

#include "cpu/isa.h"

namespace {

using vim::cpu::BiConv;
using vim::cpu::Kernels;

constexpr double kOperationsPerOutput = 32;  // mostly SiLU

// A task's rows of x and its neighbours' should fit the first-level cache beside one another's; and tasks are what
// threads share out.
constexpr int64_t kTokensPerTask = 16;

vim_status Run(const Kernels* kernels, const vim_bi_causal_conv1d_desc* desc, const vim_bi_causal_conv1d_args* args,
               vim_parallel_for parallel_for, void* pool) {
  if (kernels == nullptr || !vim_bi_causal_conv1d_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->batch == 0 || desc->length == 0) return VIM_OK;
  const int64_t tasks_per_batch = (desc->length + kTokensPerTask - 1) / kTokensPerTask;
  const BiConv conv = {desc, args, kTokensPerTask, tasks_per_batch};
  const double operations = kOperationsPerOutput * 2 * static_cast<double>(desc->batch) * desc->length * desc->channels;
  vim::cpu::RunTasks(kernels->bi_conv, conv, static_cast<size_t>(desc->batch * tasks_per_batch), operations,
                     parallel_for, pool);
  return VIM_OK;
}

}  // namespace

extern "C" {

vim_status vim_bi_causal_conv1d_cpu(const vim_bi_causal_conv1d_desc* desc, const vim_bi_causal_conv1d_args* args,
                                    vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::ChosenKernels(), desc, args, parallel_for, pool);
}

vim_status vim_bi_causal_conv1d_cpu_isa(const char* isa, const vim_bi_causal_conv1d_desc* desc,
                                        const vim_bi_causal_conv1d_args* args, vim_parallel_for parallel_for,
                                        void* pool) {
  return Run(vim::cpu::FindKernels(isa), desc, args, parallel_for, pool);
}

}  // extern "C"
