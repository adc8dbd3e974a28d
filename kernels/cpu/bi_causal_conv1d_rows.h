// The short convolution of both directions on a CPU: channels across lanes.
//
// A task is a few neighbouring tokens of one batch entry, all channels: what it reads is a few whole rows, which stay
// in the first-level cache while every channel's taps stay in registers. x is read as often as there are taps; the two
// SiLUs are most of the work.
#ifndef VIM_CPU_BI_CAUSAL_CONV1D_ROWS_H_
#define VIM_CPU_BI_CAUSAL_CONV1D_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/math.h"
#include "cpu/rows.h"
#include "vim/bi_causal_conv1d.h"

namespace vim::cpu {
namespace {

// Tokens [begin, end) of one batch entry, kWidth channels from `channel` on. kTaps: their number where it is known, so
// that they stay in registers; else 0. kWhole: all kWidth channels exist.
template <typename Io, int kWidth, int kTaps, bool kWhole>
VIM_INLINE void ConvPart(const BiConv& conv, int64_t batch, int64_t begin, int64_t end, int64_t channel) {
  using T = typename Io::Type;
  using Exact = Float32<kWidth>;
  using Float = typename Vector<kWidth>::Float;
  constexpr int kMaxTaps = kTaps ? kTaps : 16;  // as vim_bi_causal_conv1d_supports says
  const vim_bi_causal_conv1d_desc& desc = *conv.desc;
  const vim_bi_causal_conv1d_args& args = *conv.args;
  const int64_t channels = desc.channels, length = desc.length, stride = desc.x_token_stride;
  const int taps = kTaps ? kTaps : static_cast<int>(desc.taps);
  const int lanes = kWhole ? kWidth : static_cast<int>(channels - channel);
  const T* const x = static_cast<const T*>(args.x) + batch * desc.x_batch_stride + channel;
  T* const past = static_cast<T*>(args.u[0]) + batch * length * channels + channel;
  T* const future = static_cast<T*>(args.u[1]) + batch * length * channels + channel;

  const Float past_bias = LoadPart<Exact, kWidth>(args.bias[0] + channel, lanes);
  const Float future_bias = LoadPart<Exact, kWidth>(args.bias[1] + channel, lanes);
  Float past_weight[kMaxTaps], future_weight[kMaxTaps];
  for (int k = 0; k < taps; ++k) {
    past_weight[k] = LoadPart<Exact, kWidth>(args.weight[0] + k * channels + channel, lanes);
    future_weight[k] = LoadPart<Exact, kWidth>(args.weight[1] + k * channels + channel, lanes);
  }

  const auto load = [&](int64_t t) { return LoadPart<Io, kWidth>(x + t * stride, lanes); };
  const auto load_or_zero = [&](int64_t t) { return t >= 0 && t < length ? load(t) : Float{}; };
  const auto token = [&](int64_t t, const auto& row) {
    Float f = past_bias, b = future_bias;
    for (int k = 0; k < taps; ++k) {
      f += past_weight[k] * row(t - (taps - 1) + k);
      b += future_weight[k] * row(t + (taps - 1) - k);
    }
    StorePart<Io, kWidth>(past + t * channels, Silu(f), lanes);
    StorePart<Io, kWidth>(future + t * channels, Silu(b), lanes);
  };
  for (int64_t t = begin; t < end; ++t) {
    if (t >= taps - 1 && t + taps - 1 < length)
      token(t, load);
    else
      token(t, load_or_zero);
  }
}

template <typename Io, int kWidth, int kTaps>
VIM_INLINE void ConvTokens(const BiConv& conv, int64_t batch, int64_t begin, int64_t end) {
  int64_t channel = 0;
  for (; channel + kWidth <= conv.desc->channels; channel += kWidth)
    ConvPart<Io, kWidth, kTaps, true>(conv, batch, begin, end, channel);
  if (channel < conv.desc->channels) ConvPart<Io, kWidth, kTaps, false>(conv, batch, begin, end, channel);
}

template <int kWidth>
void RunBiConv(const BiConv& conv, size_t index) {
  const int64_t batch = static_cast<int64_t>(index) / conv.tasks_per_batch;
  const int64_t begin = static_cast<int64_t>(index) % conv.tasks_per_batch * conv.tokens_per_task;
  const int64_t left = conv.desc->length - begin;
  const int64_t end = begin + (left < conv.tokens_per_task ? left : conv.tokens_per_task);
  WithIo<kWidth>(conv.desc->io, [&](auto io) {
    if (conv.desc->taps == 4) return ConvTokens<decltype(io), kWidth, 4>(conv, batch, begin, end);
    ConvTokens<decltype(io), kWidth, 0>(conv, batch, begin, end);
  });
}

}  // namespace
}  // namespace vim::cpu

#endif  // VIM_CPU_BI_CAUSAL_CONV1D_ROWS_H_
