#include "cpu/selective_scan_tile.h"

namespace vim::cpu {

// Four lanes: what SSE2, NEON and the vector units of other 64-bit targets have at the least.
void RunTaskBaseline(const Scan& scan, size_t index) { RunTaskOfWidth<4>(scan, index); }

}  // namespace vim::cpu
