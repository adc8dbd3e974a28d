#include "cpu/kernels_of_width.h"

namespace vim::cpu {

// Four lanes: what SSE2, NEON and the vector units of other 64-bit targets have at the least.
constexpr Kernels kBaseline = KernelsOfWidth<4>();

}  // namespace vim::cpu
