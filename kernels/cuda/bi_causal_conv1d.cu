// The short convolution in both directions, and SiLU, from one read of x.
//
// A thread slides over a run of tokens with the last `taps` values of 4 channels (or 1) in registers. With x up to
// token t in the window both the forward output of t and the backward output of t - (taps - 1) can be formed, so the
// sequence is walked taps - 1 steps beyond its end, over zeros. Neighbouring threads hold neighbouring channels. The
// kernel moves 3 elements a (token, channel) and computes 2 taps FMAs and two SiLUs for them: memory binds it.
#include <cstdint>

#include "cuda/math.cuh"
#include "cuda/status.h"
#include "vim/bi_causal_conv1d.h"

namespace vim::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 4;  // tokens loaded at once

struct ConvParams {
  const void* x;
  const float* weight[2];
  const float* bias[2];
  void* u[2];
  int64_t x_batch, x_token;
  int batch, length, channels, taps;
  int steps;   // of the walk a thread takes: a multiple of kGroup
  int chunks;  // threads that share a walk
};

template <typename IO, int kChannels>
struct Vector {  // adjacent channels of one token
  using E = Element<IO>;
  using Bits = typename E::Bits;
  float value[kChannels];

  static __device__ __forceinline__ Vector Load(const Bits* from) {
    Vector vector;
    if constexpr (kChannels == 4) {
      const float4 four = E::ToFloat4(*reinterpret_cast<const typename E::Bits4*>(from));
      vector.value[0] = four.x, vector.value[1] = four.y, vector.value[2] = four.z, vector.value[3] = four.w;
    } else {
      vector.value[0] = E::ToFloat(*from);
    }
    return vector;
  }
  __device__ __forceinline__ void Store(Bits* to) const {
    if constexpr (kChannels == 4) {
      *reinterpret_cast<typename E::Bits4*>(to) = E::FromFloat4(make_float4(value[0], value[1], value[2], value[3]));
    } else {
      *to = E::FromFloat(value[0]);
    }
  }
};

template <typename IO, int kTaps, int kChannels>
__global__ void __launch_bounds__(kThreads) BiCausalConv(const __grid_constant__ ConvParams p) {
  using V = Vector<IO, kChannels>;
  using W = Vector<float, kChannels>;
  using Bits = typename V::Bits;
  const int vectors = p.channels / kChannels;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t batch = index / vectors / p.chunks;
  if (batch >= p.batch) return;
  const int channel = static_cast<int>(index % vectors) * kChannels;
  const int64_t first = index / vectors % p.chunks * p.steps;

  W weight[2][kTaps], bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bias[i] = W::Load(p.bias[i] + channel);
#pragma unroll
    for (int k = 0; k < kTaps; ++k) weight[i][k] = W::Load(p.weight[i] + int64_t{k} * p.channels + channel);
  }

  const Bits* const x = static_cast<const Bits*>(p.x) + batch * p.x_batch + channel;
  auto token_of_x = [&](int64_t token) {
    return token >= 0 && token < p.length ? V::Load(x + token * p.x_token) : V{};
  };
  const int64_t out = (batch * p.length + first) * p.channels + channel;
  Bits* forward = static_cast<Bits*>(p.u[0]) + out;
  Bits* backward = static_cast<Bits*>(p.u[1]) + out - int64_t{kTaps - 1} * p.channels;

  V window[kTaps - 1 + kGroup];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) window[i] = token_of_x(first - (kTaps - 1) + i);

#pragma unroll 1
  for (int64_t start = first; start < first + p.steps && start < p.length + (kTaps - 1); start += kGroup) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) window[kTaps - 1 + g] = token_of_x(start + g);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      V sum[2];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float s = bias[i].value[c];
#pragma unroll
          for (int k = 0; k < kTaps; ++k)
            s = fmaf(weight[i][i ? kTaps - 1 - k : k].value[c], window[g + k].value[c], s);
          sum[i].value[c] = Silu(s);
        }
      }
      const int64_t token = start + g;
      if (token < p.length) sum[0].Store(forward);
      if (token >= kTaps - 1 && token < p.length + (kTaps - 1)) sum[1].Store(backward);
      forward += p.channels;
      backward += p.channels;
    }
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) window[i] = window[kGroup + i];
  }
}

// Any number of taps: an output of both directions a thread, straight from memory.
template <typename IO>
__global__ void __launch_bounds__(kThreads) BiCausalConvAnyTaps(const __grid_constant__ ConvParams p) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t batch = index / p.channels / p.length;
  if (batch >= p.batch) return;
  const int channel = static_cast<int>(index % p.channels);
  const int64_t token = index / p.channels % p.length;
  const Bits* const x = static_cast<const Bits*>(p.x) + batch * p.x_batch + channel;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float s = p.bias[i][channel];
    for (int k = 0; k < p.taps; ++k) {
      const int64_t from = i ? token + (p.taps - 1) - k : token - (p.taps - 1) + k;
      if (from >= 0 && from < p.length)
        s = fmaf(p.weight[i][int64_t{k} * p.channels + channel], E::ToFloat(x[from * p.x_token]), s);
    }
    static_cast<Bits*>(p.u[i])[index] = E::FromFloat(Silu(s));
  }
}

// Blocks for so many threads; 0 when CUDA's grid does not hold them.
unsigned Blocks(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0;
}

template <typename IO, int kTaps, int kChannels>
cudaError_t LaunchSliding(ConvParams p, cudaStream_t stream) {
  const int64_t walk = int64_t{p.length} + kTaps - 1;
  const int64_t walks = int64_t{p.batch} * (p.channels / kChannels);
  // Long runs read fewer tokens twice; enough threads come first: 64 Ki are 16 warps on each SM of an H100.
  p.steps = 32;
  while (p.steps > kGroup && walks * ((walk + p.steps - 1) / p.steps) < 65536) p.steps /= 2;
  p.chunks = static_cast<int>((walk + p.steps - 1) / p.steps);
  const unsigned blocks = Blocks(walks * p.chunks);
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  BiCausalConv<IO, kTaps, kChannels><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename IO, int kChannels>
cudaError_t LaunchTaps(const ConvParams& p, cudaStream_t stream) {
  switch (p.taps) {
    case 2:
      return LaunchSliding<IO, 2, kChannels>(p, stream);
    case 3:
      return LaunchSliding<IO, 3, kChannels>(p, stream);
    case 4:
      return LaunchSliding<IO, 4, kChannels>(p, stream);
    default: {
      const unsigned blocks = Blocks(int64_t{p.batch} * p.length * p.channels);
      if (blocks == 0) return cudaErrorInvalidConfiguration;
      BiCausalConvAnyTaps<IO><<<blocks, kThreads, 0, stream>>>(p);
      return cudaGetLastError();
    }
  }
}

// Whether every row of 4 channels starts on a multiple of its size.
template <typename IO>
bool Aligned(const ConvParams& p) {
  uint64_t x =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.u[0]) | reinterpret_cast<uintptr_t>(p.u[1]);
  if (p.batch > 1) x |= static_cast<uint64_t>(p.x_batch) * sizeof(IO);
  if (p.length > 1) x |= static_cast<uint64_t>(p.x_token) * sizeof(IO);
  uint64_t fp32 = 0;
  for (int i = 0; i < 2; ++i) fp32 |= reinterpret_cast<uintptr_t>(p.weight[i]) | reinterpret_cast<uintptr_t>(p.bias[i]);
  return p.channels % 4 == 0 && x % (4 * sizeof(IO)) == 0 && fp32 % 16 == 0;
}

template <typename IO>
cudaError_t Launch(const ConvParams& p, cudaStream_t stream) {
  return Aligned<IO>(p) ? LaunchTaps<IO, 4>(p, stream) : LaunchTaps<IO, 1>(p, stream);
}

}  // namespace
}  // namespace vim::cuda

extern "C" vim_status vim_bi_causal_conv1d_cuda(const vim_bi_causal_conv1d_desc* desc,
                                                const vim_bi_causal_conv1d_args* args, void* stream) {
  using namespace vim::cuda;
  if (!vim_bi_causal_conv1d_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->batch == 0 || desc->length == 0) return VIM_OK;
  ConvParams p = {};
  p.x = args->x;
  for (int i = 0; i < 2; ++i) {
    p.weight[i] = args->weight[i];
    p.bias[i] = args->bias[i];
    p.u[i] = args->u[i];
  }
  p.x_batch = desc->x_batch_stride;
  p.x_token = desc->x_token_stride;
  p.batch = static_cast<int>(desc->batch);
  p.length = static_cast<int>(desc->length);
  p.channels = static_cast<int>(desc->channels);
  p.taps = static_cast<int>(desc->taps);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (desc->io) {
    case VIM_F32:
      return StatusOf(Launch<float>(p, cuda_stream));
    case VIM_F16:
      return StatusOf(Launch<__half>(p, cuda_stream));
    default:
      return StatusOf(Launch<__nv_bfloat16>(p, cuda_stream));
  }
}
