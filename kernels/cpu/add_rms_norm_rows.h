// The residual add and RMSNorm on a CPU: channels across lanes, a row at a time, which stays in the first-level cache
// between the two times it is walked.
#ifndef VIM_CPU_ADD_RMS_NORM_ROWS_H_
#define VIM_CPU_ADD_RMS_NORM_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/math.h"
#include "cpu/rows.h"
#include "vim/add_rms_norm.h"

namespace vim::cpu {
namespace {

template <typename Io, int kWidth>
VIM_INLINE void NormRow(const vim_add_rms_norm_desc& desc, const typename Io::Type* h, const float* r,
                        const float* weight, typename Io::Type* n, float* r_out) {
  using Exact = Float32<kWidth>;
  constexpr int kParts = kLanes / kWidth;
  constexpr int kSums = 4;  // as many as an addition takes cycles
  Row<kWidth> squares[kSums] = {};
  int next = 0;
  for (int64_t channel = 0; channel < desc.channels; channel += kLanes) {
    const int lanes = LanesFrom(channel, desc.channels);
    Row<kWidth> sum = LoadRow<Exact, kWidth>(r + channel, lanes);
    const Row<kWidth> add = LoadRow<Io, kWidth>(h + channel, lanes);
    for (int p = 0; p < kParts; ++p) {
      sum.part[p] += add.part[p];
      squares[next].part[p] += sum.part[p] * sum.part[p];
    }
    StoreRow<Exact, kWidth>(r_out + channel, sum, lanes);
    next = (next + 1) % kSums;
  }
  float total = 0.0f;
  for (int p = 0; p < kParts; ++p) {
    const auto four = (squares[0].part[p] + squares[1].part[p]) + (squares[2].part[p] + squares[3].part[p]);
    for (int i = 0; i < kWidth; ++i) total += four[i];
  }
  const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(desc.channels) + desc.epsilon);
  for (int64_t channel = 0; channel < desc.channels; channel += kLanes) {
    const int lanes = LanesFrom(channel, desc.channels);
    Row<kWidth> row = LoadRow<Exact, kWidth>(r_out + channel, lanes);
    const Row<kWidth> by = LoadRow<Exact, kWidth>(weight + channel, lanes);
    for (int p = 0; p < kParts; ++p) row.part[p] = (row.part[p] * scale) * by.part[p];
    StoreRow<Io, kWidth>(n + channel, row, lanes);
  }
}

template <int kWidth>
void RunNorm(const Norm& norm, size_t index) {
  const vim_add_rms_norm_desc& desc = *norm.desc;
  const vim_add_rms_norm_args& args = *norm.args;
  const int64_t begin = static_cast<int64_t>(index) * norm.rows_per_task;
  const int64_t left = desc.rows - begin;
  const int64_t end = begin + (left < norm.rows_per_task ? left : norm.rows_per_task);
  WithIo<kWidth>(desc.io, [&](auto io) {
    using Io = decltype(io);
    using T = typename Io::Type;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * desc.channels;
      NormRow<Io, kWidth>(desc, static_cast<const T*>(args.h) + at, args.r + at, args.weight,
                          static_cast<T*>(args.n) + at, args.r_out + at);
    }
  });
}

}  // namespace
}  // namespace vim::cpu

#endif  // VIM_CPU_ADD_RMS_NORM_ROWS_H_
