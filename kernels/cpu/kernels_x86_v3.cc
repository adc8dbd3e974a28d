#include "cpu/kernels_of_width.h"

namespace vim::cpu {

constexpr Kernels kX86V3 = KernelsOfWidth<8>();

}  // namespace vim::cpu
