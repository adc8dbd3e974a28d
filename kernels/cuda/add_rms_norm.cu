// Residual add and RMSNorm. A warp takes a row and keeps its sum in registers between adding and scaling, so h and r
// are read once; rows too long or not aligned take a block each, which reads r_out back.
#include <cstdint>

#include "cuda/math.cuh"
#include "cuda/status.h"
#include "vim/add_rms_norm.h"

namespace vim::cuda {
namespace {

constexpr int kWarps = 4;         // of a block that takes a row a warp
constexpr int kRowThreads = 256;  // of a block that takes one row

struct NormParams {
  const void* h;
  const float* r;
  const float* weight;
  void* n;
  float* r_out;
  int64_t rows;
  int channels;
  float epsilon;
};

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Rows of at most 128 kQuads channels, a multiple of 4, everything aligned to 4 elements. r_out may be r: a thread
// reads what it then writes.
template <typename IO, int kQuads>
__global__ void __launch_bounds__(32 * kWarps) AddRmsNormWarp(const __grid_constant__ NormParams p) {
  using E = Element<IO>;
  using Bits4 = typename E::Bits4;
  const int lane = threadIdx.x % 32;
  const int quads = p.channels / 4;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Bits4* const h = static_cast<const Bits4*>(p.h) + row * quads;
  const auto* const r = reinterpret_cast<const float4*>(p.r) + row * quads;
  auto* const r_out = reinterpret_cast<float4*>(p.r_out) + row * quads;
  Bits4* const n = static_cast<Bits4*>(p.n) + row * quads;

  float4 sum[kQuads], weight[kQuads];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int at = i * 32 + lane;
    sum[i] = weight[i] = make_float4(0, 0, 0, 0);
    if (at < quads) {
      const float4 a = E::ToFloat4(h[at]), b = r[at];
      sum[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
      weight[i] = reinterpret_cast<const float4*>(p.weight)[at];
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kQuads; ++i)
    squares += (sum[i].x * sum[i].x + sum[i].y * sum[i].y) + (sum[i].z * sum[i].z + sum[i].w * sum[i].w);
  const float scale = 1.0f / sqrtf(WarpSum(squares) / static_cast<float>(p.channels) + p.epsilon);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int at = i * 32 + lane;
    if (at < quads) {
      const float4 s = sum[i], w = weight[i];
      r_out[at] = s;
      n[at] = E::FromFloat4(make_float4(s.x * scale * w.x, s.y * scale * w.y, s.z * scale * w.z, s.w * scale * w.w));
    }
  }
}

template <typename IO>
__global__ void __launch_bounds__(kRowThreads) AddRmsNormBlock(const __grid_constant__ NormParams p) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  __shared__ float parts[kRowThreads / 32];
  const int64_t start = int64_t{blockIdx.x} * p.channels;
  const Bits* const h = static_cast<const Bits*>(p.h) + start;
  Bits* const n = static_cast<Bits*>(p.n) + start;
  float squares = 0.0f;
  for (int c = threadIdx.x; c < p.channels; c += kRowThreads) {
    const float sum = E::ToFloat(h[c]) + p.r[start + c];
    p.r_out[start + c] = sum;
    squares = fmaf(sum, sum, squares);
  }
  squares = WarpSum(squares);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowThreads / 32; ++i) total += parts[i];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(p.channels) + p.epsilon);
  for (int c = threadIdx.x; c < p.channels; c += kRowThreads)
    n[c] = E::FromFloat(p.r_out[start + c] * scale * p.weight[c]);
}

template <typename IO, int kQuads>
cudaError_t LaunchWarp(const NormParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  AddRmsNormWarp<IO, kQuads><<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename IO>
cudaError_t Launch(const NormParams& p, cudaStream_t stream) {
  const uintptr_t io = reinterpret_cast<uintptr_t>(p.h) | reinterpret_cast<uintptr_t>(p.n);
  const uintptr_t fp32 =
      reinterpret_cast<uintptr_t>(p.r) | reinterpret_cast<uintptr_t>(p.r_out) | reinterpret_cast<uintptr_t>(p.weight);
  if (p.channels % 4 == 0 && io % (4 * sizeof(IO)) == 0 && fp32 % 16 == 0) {
    // Vim's widths: 192, 384, 768.
    if (p.channels <= 256) return LaunchWarp<IO, 2>(p, stream);
    if (p.channels <= 384) return LaunchWarp<IO, 3>(p, stream);
    if (p.channels <= 768) return LaunchWarp<IO, 6>(p, stream);
    if (p.channels <= 1024) return LaunchWarp<IO, 8>(p, stream);
  }
  if (p.rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  AddRmsNormBlock<IO><<<static_cast<unsigned>(p.rows), kRowThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace vim::cuda

extern "C" vim_status vim_add_rms_norm_cuda(const vim_add_rms_norm_desc* desc, const vim_add_rms_norm_args* args,
                                            void* stream) {
  using namespace vim::cuda;
  if (!vim_add_rms_norm_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  if (desc->rows == 0) return VIM_OK;
  const NormParams p = {
      args->h,      args->r, args->weight, args->n, args->r_out, desc->rows, static_cast<int>(desc->channels),
      desc->epsilon};
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
