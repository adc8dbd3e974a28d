// All kernels, for vectors of kWidth lanes and the instruction set that the including file is compiled for.
//
// One translation unit for each instruction set includes this and exports one `Kernels` (isa.h). Everything here and in
// the headers it includes is in an unnamed namespace or inlined, so that no linker can put one's code into another's.
#ifndef VIM_CPU_KERNELS_OF_WIDTH_H_
#define VIM_CPU_KERNELS_OF_WIDTH_H_

#include "cpu/add_rms_norm_rows.h"
#include "cpu/bi_causal_conv1d_rows.h"
#include "cpu/isa.h"
#include "cpu/selective_scan_tile.h"

namespace vim::cpu {
namespace {

template <int kWidth>
constexpr Kernels KernelsOfWidth() {
  return {RunScan<kWidth>, RunBiScan<kWidth>, RunBiConv<kWidth>, RunNorm<kWidth>};
}

}  // namespace
}  // namespace vim::cpu

#endif  // VIM_CPU_KERNELS_OF_WIDTH_H_
