#include "cpu/kernels_of_width.h"

namespace vim::cpu {

constexpr Kernels kX86V4 = KernelsOfWidth<16>();

}  // namespace vim::cpu
