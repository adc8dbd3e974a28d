#include "cuda/choose_variant.h"

#include <cmath>
#include <initializer_list>

namespace vim::cuda {
namespace {

// Measured points; Choose takes the nearest, of several at one place the first that can run. The files are written by
// `benchmarks/scan.py --tune`, which names the results file they came from there.
struct Point {
  int64_t rows;  // batch * channels of a pair
  int64_t length;
  vim_scan_variant variant;
};
constexpr Point kTable16[] = {
#include "cuda/variant_table.inc"
};
// fp32 has twice the bytes, and decays of twice the instructions.
constexpr Point kTable32[] = {
#include "cuda/variant_table_f32.inc"
};

// Shared memory a block may ask for (CUDA C++ Programming Guide, compute capabilities).
size_t SharedLimit(int sm) {
  switch (sm) {
    case 75:
      return 64 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 101:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

constexpr struct {
  int tokens, lanes, channels;
} kLanesInstances[] = {
#define VIM_LANES(tokens, lanes, channels) {tokens, lanes, channels},
    VIM_LANES_INSTANCES(VIM_LANES)
#undef VIM_LANES
};

struct StatesInstance {
  int lanes, channels, tile, items, rows, apart;
};
#define VIM_STATES(lanes, channels, tile, items, rows, apart, blocks) {lanes, channels, tile, items, rows, apart},
constexpr StatesInstance kStatesInstances[] = {VIM_STATES_INSTANCES(VIM_STATES)};
constexpr StatesInstance kChunkedInstances[] = {VIM_STATES_CHUNKED(VIM_STATES)};
#undef VIM_STATES

template <size_t kCount>
bool IsOneOf(const StatesInstance (&instances)[kCount], const vim_scan_variant& variant) {
  for (const StatesInstance& each : instances)
    if (each.lanes == variant.lanes && each.channels == variant.channels && each.tile == variant.tokens &&
        each.items == variant.split && each.rows == variant.rows && each.apart == variant.apart)
      return true;
  return false;
}

}  // namespace

bool CanRun(const vim_scan_variant& variant, const Sizes& sizes, int sm) {
  if (variant.form == VIM_SCAN_GENERIC) return true;
  if (sizes.states != 16 || !sizes.states_aligned || sizes.length > (1 << 30)) return false;
  const int64_t per_group = sizes.channels / sizes.groups;
  if (variant.form == VIM_SCAN_SEQUENTIAL) {
    if (sizes.row_alignment < 16) return false;
    if (variant.channels != 1 && !(variant.channels == 2 && sizes.element_bytes == 2)) return false;
    return sizes.groups == 1 || per_group % (64 * variant.channels) == 0;
  }
  if (variant.form == VIM_SCAN_STATES) {
    if (!IsOneOf(kStatesInstances, variant) || sizes.row_alignment < 4 * sizes.element_bytes) return false;
    if (sizes.longest_row > StatesSizes::kLongestRow) return false;
    if (sizes.groups != 1 && per_group % variant.channels != 0) return false;
    if (variant.chunks > 1) {
      const int64_t rows = sizes.batch * sizes.channels * (sizes.pair ? 2 : 1);
      if (!sizes.workspace || !IsOneOf(kChunkedInstances, variant) || variant.chunks > StatesSizes::kMostChunks)
        return false;
      if (sizes.groups != 1 && per_group % StatesSizes::kCarryChannels != 0) return false;
      if (StatesSizes::Workspace(rows, sizes.length, sizes.states) == 0) return false;
    }
    return (sizes.pair ? 2 : 1) * StatesSizes::Bytes(variant.channels, variant.tokens) <= SharedLimit(sm);
  }
  if (variant.form != VIM_SCAN_LANES) return false;
  bool instance = false;
  for (const auto& each : kLanesInstances)
    instance |= each.tokens == variant.tokens && each.lanes == variant.lanes && each.channels == variant.channels;
  if (!instance || (variant.split != 1 && variant.split != 2 && variant.split != 4)) return false;
  if (sizes.row_alignment < LanesSizes::Piece(variant.channels, sizes.element_bytes) * sizes.element_bytes)
    return false;
  if (sizes.groups != 1 && per_group % variant.channels != 0) return false;
  if (variant.apart && (!sizes.pair || sm < 90)) return false;
  const int directions = sizes.pair && !variant.apart ? 2 : 1;
  if (directions * variant.split * variant.channels * variant.lanes > kLanesMaxThreads) return false;
  return directions *
             LanesSizes::Bytes(variant.tokens, variant.lanes, variant.channels, variant.split, sizes.element_bytes) <=
         SharedLimit(sm);
}

vim_scan_variant Choose(const Sizes& sizes, int sm) {
  // A single direction has half the rows of a pair and so the parallelism of half the batch.
  const double rows = std::log2(static_cast<double>(sizes.batch) * sizes.channels * (sizes.pair ? 1.0 : 0.5) + 1);
  const double length = std::log2(static_cast<double>(sizes.length) + 1);
  const vim_scan_variant generic = {VIM_SCAN_GENERIC, 0, 0, 0, 0, 0, 0, 0};
  vim_scan_variant best = generic;
  double best_distance = INFINITY;
  const auto consider = [&](const Point& point) {
    vim_scan_variant variant = point.variant;
    if (variant.form == VIM_SCAN_LANES && (!sizes.pair || sm < 90)) variant.apart = 0;
    if (!CanRun(variant, sizes, sm)) return;
    // Taking the next measured length costs padding, taking other rows costs balance: neither weighs more.
    const double distance = std::abs(rows - std::log2(static_cast<double>(point.rows))) +
                            std::abs(length - std::log2(static_cast<double>(point.length)));
    if (distance < best_distance) {
      best_distance = distance;
      best = variant;
    }
  };
  if (sizes.element_bytes == 4) {
    for (const Point& point : kTable32) consider(point);
  } else {
    for (const Point& point : kTable16) consider(point);
  }
  if (best.form != VIM_SCAN_GENERIC) return best;
  for (const int channels : {2, 1}) {
    const vim_scan_variant sequential = {VIM_SCAN_SEQUENTIAL, channels, 0, 0, 0, 0, 0, 0};
    if (CanRun(sequential, sizes, sm)) return sequential;
  }
  return generic;
}

}  // namespace vim::cuda
