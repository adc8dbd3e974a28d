// The C interface of the scan, of one direction and of both: checks, and the distribution of tasks.
#include "vim/selective_scan.h"

#include <algorithm>

#include "common/desc.h"
#include "cpu/isa.h"
#include "vim/bi_selective_scan.h"

namespace {

using vim::cpu::BiScan;
using vim::cpu::Kernels;
using vim::cpu::Scan;
using vim::cpu::ScanSplit;

constexpr double kOperationsPerState = 8;

// Neighbouring tiles share the loads of B and C and read longer pieces of each row: two rather than one are worth 4 %
// at 197 tokens, and four rather than two a fifth at 6085, where rows come from memory. But tasks are what threads
// share out, so there should be a few for each, and an even number of them at the usual sizes.
ScanSplit Split(const vim_selective_scan_desc& desc) {
  constexpr int64_t kTasks = 12;
  constexpr int64_t kLong = 1024;
  const int64_t tiles_per_group = (desc.channels / desc.groups + vim::cpu::kLanes - 1) / vim::cpu::kLanes;
  const int64_t spare = desc.batch * desc.groups * tiles_per_group / kTasks;
  const int64_t least = desc.length >= kLong ? 4 : 1;
  const int64_t fit = std::min<int64_t>(vim::cpu::kMaxTiles, vim::cpu::kMaxRows / desc.states);
  const int64_t tiles = std::min(std::max(spare, least), fit);
  return {static_cast<int>(tiles), (tiles_per_group + tiles - 1) / tiles};
}

size_t Tasks(const vim_selective_scan_desc& desc, const ScanSplit& split) {
  return static_cast<size_t>(desc.batch * desc.groups * split.tasks_per_group);
}

double Operations(const vim_selective_scan_desc& desc) {
  return kOperationsPerState * static_cast<double>(desc.batch) * desc.channels * desc.length * desc.states;
}

vim_status Run(const Kernels* kernels, const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
               vim_parallel_for parallel_for, void* pool) {
  if (kernels == nullptr || !vim_selective_scan_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->batch == 0 || desc->length == 0) return VIM_OK;
  const Scan scan = {desc, args, Split(*desc)};
  vim::cpu::RunTasks(kernels->scan, scan, Tasks(*desc, scan.split), Operations(*desc), parallel_for, pool);
  return VIM_OK;
}

vim_status Run(const Kernels* kernels, const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
               vim_parallel_for parallel_for, void* pool) {
  if (kernels == nullptr || !vim_bi_selective_scan_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->batch == 0 || desc->length == 0) return VIM_OK;
  BiScan scan = {};
  for (int i = 0; i < 2; ++i) {
    scan.desc[i] = vim::OneDirection(*desc, i);
    scan.args[i] = {args->u[i], args->delta[i], args->A[i],          args->B[i], args->C[i],
                    args->D[i], args->z,        args->delta_bias[i], args->y};
  }
  scan.desc[0].has_z = 0;
  scan.y_scale = desc->has_y_scale ? args->y_scale : nullptr;
  scan.split = Split(scan.desc[0]);
  const double operations = Operations(scan.desc[0]) + Operations(scan.desc[1]);
  vim::cpu::RunTasks(kernels->bi_scan, scan, Tasks(scan.desc[0], scan.split), operations, parallel_for, pool);
  return VIM_OK;
}

}  // namespace

extern "C" {

vim_status vim_selective_scan_cpu(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                  vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::ChosenKernels(), desc, args, parallel_for, pool);
}

vim_status vim_selective_scan_cpu_isa(const char* isa, const vim_selective_scan_desc* desc,
                                      const vim_selective_scan_args* args, vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::FindKernels(isa), desc, args, parallel_for, pool);
}

vim_status vim_bi_selective_scan_cpu(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                                     vim_parallel_for parallel_for, void* pool) {
  return Run(vim::cpu::ChosenKernels(), desc, args, parallel_for, pool);
}

vim_status vim_bi_selective_scan_cpu_isa(const char* isa, const vim_bi_selective_scan_desc* desc,
                                         const vim_bi_selective_scan_args* args, vim_parallel_for parallel_for,
                                         void* pool) {
  return Run(vim::cpu::FindKernels(isa), desc, args, parallel_for, pool);
}

}  // extern "C"
