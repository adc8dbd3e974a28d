#include "cpu/selective_scan_tile.h"

namespace vim::cpu {

void RunTaskX86V3(const Scan& scan, size_t index) { RunTaskOfWidth<8>(scan, index); }

}  // namespace vim::cpu
