// Elementary functions and 16-bit conversions on vectors of fp32 lanes, any width (GCC and Clang vector extensions).
// They assume IEEE semantics (no -ffast-math): each comparison is placed so that a NaN falls through to the result.
//
// tests/cpp/cpu_math_check.cc holds each function to the bound stated beside it.
#ifndef VIM_CPU_MATH_H_
#define VIM_CPU_MATH_H_

#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

// Always inlined: translation units compiled for different instruction sets include this, and must not share a copy.
#define VIM_INLINE inline __attribute__((always_inline))

namespace vim::cpu {

template <int kWidth>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * kWidth)));
  typedef uint32_t Word __attribute__((vector_size(4 * kWidth)));
  typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));
};

// Integer lanes as wide as F's.
template <typename F>
struct WordOf {
  typedef uint32_t Type __attribute__((vector_size(sizeof(F))));
};

template <typename To, typename From>
VIM_INLINE To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename F>
VIM_INLINE typename WordOf<F>::Type Bits(F x) {
  return BitCast<typename WordOf<F>::Type>(x);
}

// Relative error of Exp2 for x in [-125.5, 127.5]. Below -126.5 the result is 0, above 127.5 it is infinity.
// Exp2(0) is exactly 1, so a state that does not decay does not drift.
constexpr double kExp2MaxRelativeError = 2.0e-7;
constexpr float kExp2Low = -125.5f;
constexpr float kExp2High = 127.5f;

// Adding it rounds to a whole number, and leaves that number plus the exponent's bias in the low mantissa bits.
constexpr float kRoundAndBias = 12582912.0f + 127.0f;

// 2^fraction x 2^whole, where `fraction` is in [-1/2, 1/2] and `biased` is whole + kRoundAndBias.
template <typename F>
VIM_INLINE F Exp2Parts(F fraction, F biased) {
  // Minimax for 1 + f q(f), which has p(0) = 1: 9.1e-8 before rounding.
  F p = 0.0013264727f * fraction + 0.009671513f;
  p = p * fraction + 0.055507336f;
  p = p * fraction + 0.24022242f;
  p = p * fraction + 0.693147f;
  p = p * fraction + 1.0f;
  // A product, not an addition to the exponent bits: the latter can turn a NaN's payload into a number.
  return p * BitCast<F>(Bits(biased) << 23);
}

// The larger and the smaller of x and a bound, x itself when it is NaN. That is what the instructions of x86 do with
// the operands in this order, but compilers do not find them from the comparison. (The 512-bit forms with a mask: GCC
// 12 warns of an uninitialised value in its own header for those without.)
template <typename F>
VIM_INLINE F AtLeast(F x, float bound) {
  const F low = F{} + bound;
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return _mm512_maskz_max_ps(0xffff, low, x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return _mm256_max_ps(low, x);
#endif
#if defined(__SSE__)
  if constexpr (sizeof(F) == 16) return _mm_max_ps(low, x);
#endif
  return x < low ? low : x;
}

template <typename F>
VIM_INLINE F AtMost(F x, float bound) {
  const F high = F{} + bound;
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return _mm512_maskz_min_ps(0xffff, high, x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return _mm256_min_ps(high, x);
#endif
#if defined(__SSE__)
  if constexpr (sizeof(F) == 16) return _mm_min_ps(high, x);
#endif
  return x > high ? high : x;
}

template <typename F>
VIM_INLINE F Exp2(F x) {
  x = AtMost(AtLeast(x, -127.0f), 128.0f);
  const F biased = x + kRoundAndBias;
  return Exp2Parts(x - (biased - kRoundAndBias), biased);
}

// Relative error of Exp for x in [-87, 88]. Below it falls to less than 1e-38, above 88.4 it is infinity.
constexpr double kExpMaxRelativeError = 2.0e-7;
constexpr float kExpLow = -87.0f;
constexpr float kExpHigh = 88.0f;

template <typename F>
VIM_INLINE F Exp(F x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits: exact when multiplied by any whole number met here
  constexpr float kLn2Low = -2.12194440e-4f;
  x = AtMost(AtLeast(x, -88.0f), 88.7f);
  const F biased = x * kLog2E + kRoundAndBias;
  const F whole = biased - kRoundAndBias;
  const F rest = (x - whole * kLn2High) - whole * kLn2Low;
  return Exp2Parts(rest * kLog2E, biased);
}

// Relative error of Softplus for x >= -87. x itself above 20, as in PyTorch.
constexpr double kSoftplusMaxRelativeError = 3.5e-7;

template <typename F>
VIM_INLINE F Softplus(F x) {
  const F zero = {};
  const F e = Exp(x > zero ? -x : x);  // in (0, 1]
  // log1p(e) = 2 atanh(e / (2 + e)); the series in the square converges fast because the argument is at most 1/3.
  const F s = e / (2.0f + e);
  const F s2 = s * s;
  F r = 0.14012311f * s2 + 0.13999555f;
  r = r * s2 + 0.2001085f;
  r = r * s2 + 0.33333206f;
  const F log1p = 2.0f * s + 2.0f * s * s2 * r;
  const F y = (x > zero ? x : zero) + log1p;
  return x > zero + 20.0f ? x : y;
}

// Relative error of Silu (x times the logistic function) for x >= -87; below -88.4 it is -0.
constexpr double kSiluMaxRelativeError = 2.7e-7;

template <typename F>
VIM_INLINE F Silu(F x) {
  return x / (1.0f + Exp(-x));
}

// fp16 and bf16 without hardware instructions, so that every target computes the same bits. W: 32-bit lanes, each
// holding one 16-bit value.

template <typename F>
VIM_INLINE F FromHalf(typename WordOf<F>::Type h) {
  using W = typename WordOf<F>::Type;
  const W magnitude = (h & 0x7fffu) << 13;
  const W normal = magnitude + (112u << 23);
  const W special = magnitude + (224u << 23);  // infinity and NaN
  // Subnormal: put the mantissa under 2^-14 and take 2^-14 away. Exact, and free of fp32 subnormals, which a runtime
  // that flushes them would lose.
  const W subnormal = Bits(BitCast<F>(magnitude + (113u << 23)) - 6.103515625e-5f);
  W bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return BitCast<F>(bits | (h & 0x8000u) << 16);
}

template <typename F>
VIM_INLINE typename WordOf<F>::Type ToHalf(F x) {
  using W = typename WordOf<F>::Type;
  const W bits = Bits(x);
  const W magnitude = bits & 0x7fffffffu;
  const W sign = (bits >> 16) & 0x8000u;
  // Round to nearest even on the 13 bits that go; a carry into the exponent is right, up to infinity.
  const W normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 aligns the mantissa to fp16's subnormal step and rounds it.
  const W subnormal = Bits(BitCast<F>(magnitude) + 0.5f) - 0x3f000000u;
  W half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? W{} + 0x7c00u : half;
  half = magnitude > (255u << 23) ? W{} + 0x7e00u : half;
  return half | sign;
}

template <typename F>
VIM_INLINE F FromBfloat16(typename WordOf<F>::Type b) {
  return BitCast<F>(b << 16);
}

template <typename F>
VIM_INLINE typename WordOf<F>::Type ToBfloat16(F x) {
  using W = typename WordOf<F>::Type;
  const W bits = Bits(x);
  const W rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const W nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > (255u << 23) ? nan : rounded;
}

}  // namespace vim::cpu

#endif  // VIM_CPU_MATH_H_
