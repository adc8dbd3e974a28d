#include "cpu/selective_scan_tile.h"

namespace vim::cpu {

void RunTaskX86V4(const Scan& scan, size_t index) { RunTaskOfWidth<16>(scan, index); }

}  // namespace vim::cpu
