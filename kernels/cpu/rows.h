// Rows of channels as the kernels hold them: a few fp32 vectors, whatever the type and the alignment in memory.
#ifndef VIM_CPU_ROWS_H_
#define VIM_CPU_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/math.h"

namespace vim::cpu {
namespace {

template <int kWidth>
struct Float32 {
  using Type = float;
  using Float = typename Vector<kWidth>::Float;
  static VIM_INLINE Float Load(const float* from) {
    Float x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static VIM_INLINE void Store(float* to, Float x) { std::memcpy(to, &x, sizeof x); }
};

template <int kWidth>
struct Float16 {
  using Type = uint16_t;
  using Float = typename Vector<kWidth>::Float;
  using Half = typename Vector<kWidth>::Half;
  static VIM_INLINE Float Load(const uint16_t* from) {
    Half x;
    std::memcpy(&x, from, sizeof x);
    return FromFloat16<kWidth>(x);
  }
  static VIM_INLINE void Store(uint16_t* to, Float x) {
    const Half half = ToFloat16<kWidth>(x);
    std::memcpy(to, &half, sizeof half);
  }
};

template <int kWidth>
struct Bfloat16 {
  using Type = uint16_t;
  using Float = typename Vector<kWidth>::Float;
  using Half = typename Vector<kWidth>::Half;
  static VIM_INLINE Float Load(const uint16_t* from) {
    Half x;
    std::memcpy(&x, from, sizeof x);
    return FromBfloat16<Float>(__builtin_convertvector(x, typename Vector<kWidth>::Word));
  }
  static VIM_INLINE void Store(uint16_t* to, Float x) {
    const Half half = __builtin_convertvector(ToBfloat16(x), Half);
    std::memcpy(to, &half, sizeof half);
  }
};

// Calls `body` with the traits above for a vim_dtype.
template <int kWidth, typename Body>
VIM_INLINE void WithIo(int32_t io, Body body) {
  switch (io) {
    case VIM_F32:
      return body(Float32<kWidth>());
    case VIM_F16:
      return body(Float16<kWidth>());
    default:
      return body(Bfloat16<kWidth>());
  }
}

// One vector; `count` of its lanes exist in memory, the others load as zeros and are not stored.
template <typename Io, int kWidth>
VIM_INLINE typename Vector<kWidth>::Float LoadPart(const typename Io::Type* from, int count) {
  if (count >= kWidth) return Io::Load(from);
  typename Io::Type padded[kWidth] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return Io::Load(padded);
}

template <typename Io, int kWidth>
VIM_INLINE void StorePart(typename Io::Type* to, typename Vector<kWidth>::Float x, int count) {
  if (count >= kWidth) return Io::Store(to, x);
  typename Io::Type padded[kWidth];
  Io::Store(padded, x);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

// One value for each channel of a tile; lanes past the last channel hold zeros.
template <int kWidth>
struct Row {
  typename Vector<kWidth>::Float part[kLanes / kWidth];
};

template <typename Io, int kWidth>
VIM_INLINE Row<kWidth> LoadRow(const typename Io::Type* from, int count) {
  constexpr int kParts = kLanes / kWidth;
  Row<kWidth> row;
  if (count >= kLanes) {
    for (int p = 0; p < kParts; ++p) row.part[p] = Io::Load(from + p * kWidth);
  } else {
    for (int p = 0; p < kParts; ++p) row.part[p] = LoadPart<Io, kWidth>(from + p * kWidth, count - p * kWidth);
  }
  return row;
}

template <typename Io, int kWidth>
VIM_INLINE void StoreRow(typename Io::Type* to, const Row<kWidth>& row, int count) {
  constexpr int kParts = kLanes / kWidth;
  if (count >= kLanes) {
    for (int p = 0; p < kParts; ++p) Io::Store(to + p * kWidth, row.part[p]);
  } else {
    for (int p = 0; p < kParts; ++p) StorePart<Io, kWidth>(to + p * kWidth, row.part[p], count - p * kWidth);
  }
}

// How many of the channels from `channel` on fall into one tile.
VIM_INLINE int LanesFrom(int64_t channel, int64_t channels) {
  return static_cast<int>(channels - channel < kLanes ? channels - channel : kLanes);
}

}  // namespace
}  // namespace vim::cpu

#endif  // VIM_CPU_ROWS_H_
