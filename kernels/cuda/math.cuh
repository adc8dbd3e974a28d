// Elements to fp32 and back, and the functions of the kernels, in fp32.
#ifndef VIM_KERNELS_CUDA_MATH_CUH_
#define VIM_KERNELS_CUDA_MATH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#if CUDART_VERSION < 11070  // JetPack 5 has 11.4; only speed hangs on it
#undef __grid_constant__
#define __grid_constant__
#endif

namespace vim::cuda {

__device__ __forceinline__ float At(const float4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Four rows of four, transposed into four rows `pitch` floats apart.
__device__ __forceinline__ void StoreTransposed(float* to, int pitch, const float4 (&rows)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(rows[0].x, rows[1].x, rows[2].x, rows[3].x);
  *reinterpret_cast<float4*>(to + pitch) = make_float4(rows[0].y, rows[1].y, rows[2].y, rows[3].y);
  *reinterpret_cast<float4*>(to + 2 * pitch) = make_float4(rows[0].z, rows[1].z, rows[2].z, rows[3].z);
  *reinterpret_cast<float4*>(to + 3 * pitch) = make_float4(rows[0].w, rows[1].w, rows[2].w, rows[3].w);
}

constexpr float kLog2e = 1.44269504f;
constexpr int kStates = 16;  // of the two fast forms

// Element types travel as bits, so that copies need no knowledge of them.
template <typename IO>
struct Element;
template <>
struct Element<float> {
  using Bits = float;
  using Bits2 = float2;
  using Bits4 = float4;
  static __device__ __forceinline__ float ToFloat(float x) { return x; }
  static __device__ __forceinline__ float FromFloat(float x) { return x; }
  static __device__ __forceinline__ float2 ToFloat2(float2 x) { return x; }
  static __device__ __forceinline__ float2 FromFloat2(float2 x) { return x; }
  static __device__ __forceinline__ float4 ToFloat4(float4 x) { return x; }
  static __device__ __forceinline__ float4 FromFloat4(float4 x) { return x; }
};
template <>
struct Element<__half> {
  using Bits = uint16_t;
  using Bits2 = uint32_t;
  using Bits4 = uint2;
  static __device__ __forceinline__ float ToFloat(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ __forceinline__ uint16_t FromFloat(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ float2 ToFloat2(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  }
  static __device__ __forceinline__ uint32_t FromFloat2(float2 x) {
    const __half2 h = __float22half2_rn(x);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
  static __device__ __forceinline__ float4 ToFloat4(uint2 x) {
    const float2 a = ToFloat2(x.x), b = ToFloat2(x.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
  static __device__ __forceinline__ uint2 FromFloat4(float4 x) {
    return make_uint2(FromFloat2(make_float2(x.x, x.y)), FromFloat2(make_float2(x.z, x.w)));
  }
};
template <>
struct Element<__nv_bfloat16> {
  using Bits = uint16_t;
  using Bits2 = uint32_t;
  using Bits4 = uint2;
  static __device__ __forceinline__ float ToFloat(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
  static __device__ __forceinline__ uint16_t FromFloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ __forceinline__ float2 ToFloat2(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t FromFloat2(float2 x) {
    return uint32_t{FromFloat(x.x)} | uint32_t{FromFloat(x.y)} << 16;
  }
  static __device__ __forceinline__ float4 ToFloat4(uint2 x) {
    const float2 a = ToFloat2(x.x), b = ToFloat2(x.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
  static __device__ __forceinline__ uint2 FromFloat4(float4 x) {
    return make_uint2(FromFloat2(make_float2(x.x, x.y)), FromFloat2(make_float2(x.z, x.w)));
  }
};

// 2^x: one MUFU instruction. fp32, any x; 2^-22 relative; results below 2^-126 are 0 (the non-ftz form would spend
// three more instructions on them, and a decay that small is a forgotten state).
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The decay 2^x, x <= 0. The exponential unit is a few parts in 10^8 low just below 1, which a state that remembers
// 10^4 tokens adds up to 10^-5: invisible in 16-bit outputs, too much for fp32 ones. There, from -1/16 up, it is
// 1 + x P(x) with P the series of (2^x - 1) / x: half an ulp.
template <bool kFloat32>
__device__ __forceinline__ float Decay(float x) {
  const float y = Exp2(x);
  if (!kFloat32) return y;
  float p = 9.61812911e-03f;
  p = fmaf(p, x, 5.55041087e-02f);
  p = fmaf(p, x, 2.40226507e-01f);
  p = fmaf(p, x, 6.93147181e-01f);
  return x > -0.0625f ? fmaf(p, x, 1.0f) : y;
}

__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log(1 + e^x) = max(x, 0) + e P(e), e = e^-|x|: no cancellation where x is very negative, one MUFU instead of two.
// P is a minimax fit of log1p(e) / e on [0, 1]. Any x. Relative error of P: 9e-6 for 16-bit elements (whose own
// rounding is 4.9e-4), 2e-7 for fp32. Above 20 the result is x. In place; step by step for all, so that a lone warp
// has other work while a step's result is on its way.
template <bool kFloat32, int kCount>
__device__ __forceinline__ void SoftplusEach(float* x) {
  constexpr int kTerms = kFloat32 ? 9 : 6;
  constexpr float kFit[2][9] = {
      {-2.386938967e-02f, 1.012233421e-01f, -2.100501657e-01f, 3.252075016e-01f, -4.993615448e-01f, 9.999915957e-01f},
      {5.232730880e-03f, -2.950545959e-02f, 7.822645456e-02f, -1.366330236e-01f, 1.910604239e-01f, -2.484299541e-01f,
       3.331909776e-01f, -4.999949336e-01f, 9.999999404e-01f}};
  float e[kCount], p[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) e[i] = Exp2(fabsf(x[i]) * -kLog2e);
#pragma unroll
  for (int i = 0; i < kCount; ++i) p[i] = kFit[kFloat32][0];
#pragma unroll
  for (int term = 1; term < kTerms; ++term)
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = fmaf(p[i], e[i], kFit[kFloat32][term]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = fmaf(p[i], e[i], fmaxf(x[i], 0.0f));
}

template <bool kFloat32>
__device__ __forceinline__ float Softplus(float x) {
  SoftplusEach<kFloat32, 1>(&x);
  return x;
}

// x sigmoid(x): two MUFU. 2^-21 relative; exact limits at both ends (rcp of infinity is 0). In place.
template <int kCount>
__device__ __forceinline__ void SiluEach(float* x) {
  float e[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) e[i] = Exp2(x[i] * -kLog2e);
#pragma unroll
  for (int i = 0; i < kCount; ++i) e[i] = Reciprocal(1.0f + e[i]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= e[i];
}

__device__ __forceinline__ float Silu(float x) {
  SiluEach<1>(&x);
  return x;
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_MATH_CUH_
