// The C interface of the residual add and RMSNorm: checks, and the distribution of tasks.
#include "vim/add_rms_norm.h"

#include <algorithm>

#include "cpu/isa.h"

namespace {

using vim::cpu::Kernels;
using vim::cpu::Norm;

constexpr double kOperationsPerElement = 4;
constexpr int64_t kElementsPerTask = 1 << 13;

vim_status Run(const Kernels* kernels, const vim_add_rms_norm_desc* desc, const vim_add_rms_norm_args* args,
               vim_parallel_for parallel_for, void* pool) {
  if (kernels == nullptr || !vim_add_rms_norm_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->rows == 0) return VIM_OK;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / desc->channels);
  const Norm norm = {desc, args, rows_per_task};
  const double operations = kOperationsPerElement * static_cast<double>(desc->rows) * desc->channels;
  vim::cpu::RunTasks(kernels->norm, norm, static_cast<size_t>((desc->rows + rows_per_task - 1) / rows_per_task),
                     operations, parallel_for, pool);
  return VIM_OK;
}

}  // namespace

extern "C" {

vim_status vim_add_rms_norm_cpu(const vim_add_rms_norm_desc* desc, const vim_add_rms_norm_args* args,
                                vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::ChosenKernels(), desc, args, parallel_for, pool);
}

vim_status vim_add_rms_norm_cpu_isa(const char* isa, const vim_add_rms_norm_desc* desc,
                                    const vim_add_rms_norm_args* args, vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::FindKernels(isa), desc, args, parallel_for, pool);
}

}  // extern "C"
