// Which instruction sets this build and this processor have, and which one the kernels run on.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vim::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*available)();
};

#if defined(VIM_CPU_HAS_X86_V3)
// Compilers' own test for it came later than those for the rest. Asked once: a virtual machine takes 10 us to answer.
bool HasF16c() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  }();
  return has;
}

bool HasV3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && HasF16c();
}
#endif

#if defined(__aarch64__)
constexpr char kBaselineName[] = "neon";
#else
constexpr char kBaselineName[] = "baseline";
#endif

// Widest first.
constexpr Isa kIsas[] = {
#if defined(VIM_CPU_HAS_X86_V4)
    {"x86-64-v4", &kX86V4,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && HasV3();
     }},
#endif
#if defined(VIM_CPU_HAS_X86_V3)
    {"x86-64-v3", &kX86V3, HasV3},
#endif
    {kBaselineName, &kBaseline, [] { return true; }},
};

const Isa* Find(const char* name) {
  for (const Isa& isa : kIsas)
    if (isa.available() && (name == nullptr || std::strcmp(isa.name, name) == 0)) return &isa;
  return nullptr;
}

const Isa* Chosen() {
  static const Isa* const chosen = [] {
    const char* const wanted = std::getenv("VIMDEPLOY_CPU_ISA");
    return Find(wanted != nullptr && *wanted != '\0' ? wanted : nullptr);
  }();
  return chosen;
}

const Kernels* KernelsOf(const Isa* isa) { return isa != nullptr ? isa->kernels : nullptr; }

}  // namespace

const Kernels* ChosenKernels() { return KernelsOf(Chosen()); }

const Kernels* FindKernels(const char* isa) { return KernelsOf(Find(isa)); }

}  // namespace vim::cpu

extern "C" {

const char* vim_cpu_isa(void) {
  const vim::cpu::Isa* const isa = vim::cpu::Chosen();
  return isa != nullptr ? isa->name : nullptr;
}

const char* vim_cpu_isa_at(size_t index) {
  for (const vim::cpu::Isa& isa : vim::cpu::kIsas)
    if (isa.available() && index-- == 0) return isa.name;
  return nullptr;
}

}  // extern "C"
