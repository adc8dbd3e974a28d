// The ops on the CPU's execution provider: kernels on the session's own threads.
#include <cstdlib>
#include <exception>
#include <string>

#include "op.h"
#include "vim/cpu.h"

namespace vim::ort {
namespace {

struct Pool {
  const Ort::KernelContext* context;
  std::exception_ptr error;
};

// The kernels are C and their tasks do not throw; what may is ORT's own check before the first of them.
void ParallelFor(void* pool_pointer, void (*body)(void* context, size_t index), size_t count, void* context) {
  Pool& pool = *static_cast<Pool*>(pool_pointer);
  try {
    pool.context->ParallelFor(body, count, 0, context);
  } catch (...) {
    pool.error = std::current_exception();
  }
}

template <auto kKernel, typename Desc, typename Args>
vim_status OnThreads(const Desc& desc, const Args& args, const Ort::KernelContext& context) {
  Pool pool = {&context, nullptr};
  const vim_status status = kKernel(&desc, &args, ParallelFor, &pool);
  if (pool.error) std::rethrow_exception(pool.error);
  return status;
}

void CheckIsa() {
  if (vim_cpu_isa() != nullptr) return;
  std::string there;
  for (size_t i = 0; vim_cpu_isa_at(i) != nullptr; ++i) there += (i ? ", " : "") + std::string(vim_cpu_isa_at(i));
  const char* const wanted = std::getenv("VIMDEPLOY_CPU_ISA");
  Refuse("the environment variable VIMDEPLOY_CPU_ISA asks for '", wanted != nullptr ? wanted : "",
         "', which this processor or this build lacks; there are ", there);
}

}  // namespace

const Backend kCpu = {
    nullptr,
    CheckIsa,
    nullptr,
    OnThreads<vim_selective_scan_cpu>,
    OnThreads<vim_bi_selective_scan_cpu>,
    OnThreads<vim_bi_causal_conv1d_cpu>,
    OnThreads<vim_add_rms_norm_cpu>,
};

}  // namespace vim::ort
