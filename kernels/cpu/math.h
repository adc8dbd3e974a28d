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
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

// Always inlined: translation units compiled for different instruction sets include this, and must not share a copy.
#define VIM_INLINE inline __attribute__((always_inline))
#define VIM_NOINLINE __attribute__((noinline))  // of functions in unnamed namespaces, which are not shared either

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

// Relative error of Exp2 for x in [-125.5, 127.5]. Below -126 the result is less than 1.2e-38 and far below it is 0;
// from 128 on it is infinity. Exp2(0) is exactly 1, so a state that does not decay does not drift.
constexpr double kExp2MaxRelativeError = 2.0e-7;
constexpr float kExp2Low = -125.5f;
constexpr float kExp2High = 127.5f;

// A product that is not to be fused with the sums it goes into. Fused into two of them it takes two turns of the
// multipliers for one; on 512-bit vectors, with adders besides them (Zen 4), they are what the scan waits for: 4 %.
template <typename F>
VIM_INLINE F Unfused(F product) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) asm("" : "+v"(product));
#endif
  return product;
}

// How many powers 2^(j/n) one instruction looks up: x is cut into whole n-ths and a rest. Eight are worth two terms of
// the polynomial, 32 one more. 0: none.
template <typename F>
constexpr int kTable =
#if defined(__AVX512F__)
    sizeof(F) == 64 ? 32 :
#endif
#if defined(__AVX2__)
    sizeof(F) == 32 ? 8
                    :
#endif
                    0;

// Adding it rounds to a whole number, or to whole n-ths. The low bits of the mantissa then hold that number plus the
// exponent's bias, or the number of n-ths.
template <typename F>
constexpr float kRound = kTable<F> > 0 ? 12582912.0f / kTable<F> : 12582912.0f + 127.0f;

#if defined(__AVX512F__)
// 2^(j/32).
alignas(64) constexpr float kThirtySeconds[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};

// Seven multiplications a vector of states instead of eight, and those are what the scan waits for: 13 %.
VIM_INLINE Vector<16>::Float Exp2Parts(Vector<16>::Float fraction, Vector<16>::Float biased) {
  using F = Vector<16>::Float;
  F low, high;
  std::memcpy(&low, kThirtySeconds, sizeof low);
  std::memcpy(&high, kThirtySeconds + 16, sizeof high);
  const F power = _mm512_maskz_permutex2var_ps(0xffff, low, BitCast<__m512i>(biased), high);
  // power (1 + f q(f)), minimax: 5.4e-8 before rounding.
  const F q = 0.24022649f * fraction + 0.6931573f;
  return _mm512_maskz_scalef_ps(0xffff, (power * fraction) * q + power, biased - kRound<F>);
}
#endif

#if defined(__AVX2__)
// The bits of 2^(j/8), rounded, less j << 20.
alignas(32) constexpr uint32_t kEighths[8] = {
    0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u, 0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u,
};

VIM_INLINE Vector<8>::Float Exp2Parts(Vector<8>::Float fraction, Vector<8>::Float biased) {
  using F = Vector<8>::Float;
  using W = Vector<8>::Word;
  W table;
  std::memcpy(&table, kEighths, sizeof table);
  const W eighth = BitCast<W>(_mm256_permutevar8x32_epi32(BitCast<__m256i>(table), BitCast<__m256i>(biased)));
  // Minimax for 1 + f q(f), which has p(0) = 1: 2.7e-8 before rounding.
  F p = 0.055496223f * fraction + 0.24025764f;
  p = p * fraction + 0.69314724f;
  p = p * fraction + 1.0f;
  // A NaN's payload may become a number here; its fraction is a NaN too.
  return p * BitCast<F>(eighth + (Bits(biased) << 20));
}
#endif

// 2^fraction x 2^whole, where `biased` is whole + kRound and |fraction| is at most half of what that rounds to. Exactly
// 1 for zeros in every form.
template <typename F>
VIM_INLINE F Exp2Parts(F fraction, F biased) {
  // Minimax as above: 9.1e-8 before rounding.
  F p = 0.0013264727f * fraction + 0.009671513f;
  p = p * fraction + 0.055507336f;
  p = p * fraction + 0.24022242f;
  p = p * fraction + 0.693147f;
  p = p * fraction + 1.0f;
  // A product, not an addition to the exponent bits: the latter can turn a NaN's payload into a number.
  return p * BitCast<F>(Bits(biased) << 23);
}

// The larger and the smaller of two; the second where either is NaN, which is what the instructions of x86 do, but
// compilers do not find them from the comparison. (The 512-bit forms with a mask: GCC 12 warns of an uninitialised
// value in its own header for those without.)
template <typename F>
VIM_INLINE F Larger(F x, F y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return _mm512_maskz_max_ps(0xffff, x, y);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return _mm256_max_ps(x, y);
#endif
#if defined(__SSE__)
  if constexpr (sizeof(F) == 16) return _mm_max_ps(x, y);
#endif
  return x > y ? x : y;
}

template <typename F>
VIM_INLINE F Smaller(F x, F y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return _mm512_maskz_min_ps(0xffff, x, y);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return _mm256_min_ps(x, y);
#endif
#if defined(__SSE__)
  if constexpr (sizeof(F) == 16) return _mm_min_ps(x, y);
#endif
  return x < y ? x : y;
}

// x kept on one side of a bound, or NaN.
template <typename F>
VIM_INLINE F AtLeast(F x, float bound) {
#if defined(__aarch64__)
  // These are NaN where either is.
  if constexpr (sizeof(F) == 16)
    return BitCast<F>(vmaxq_f32(BitCast<float32x4_t>(F{} + bound), BitCast<float32x4_t>(x)));
#endif
  return Larger(F{} + bound, x);
}

template <typename F>
VIM_INLINE F AtMost(F x, float bound) {
#if defined(__aarch64__)
  if constexpr (sizeof(F) == 16)
    return BitCast<F>(vminq_f32(BitCast<float32x4_t>(F{} + bound), BitCast<float32x4_t>(x)));
#endif
  return Smaller(F{} + bound, x);
}

// Exp2 for x in [kExp2Low, kExp2High] or NaN; the same bits.
template <typename F>
VIM_INLINE F Exp2InRange(F x) {
  const F biased = x + kRound<F>;
  return Exp2Parts(x - (biased - kRound<F>), biased);
}

// Beyond these the result is 0, or infinity. A form that puts the exponent together from bits must not leave them by
// more than this; the one that scales must leave them by enough.
template <typename F>
constexpr float kExp2Least = kTable<F> == 32 ? -160.0f : -127.0f;
template <typename F>
constexpr float kExp2Most = kTable<F> == 32 ? 160.0f : 128.0f;

template <typename F>
VIM_INLINE F Exp2(F x) {
  return Exp2InRange(AtMost(AtLeast(x, kExp2Least<F>), kExp2Most<F>));
}

// Relative error of Exp for x in [-87, 88]. Below it falls to less than 1e-38, above 88.7 it is infinity.
constexpr double kExpMaxRelativeError = 2.0e-7;
constexpr float kExpLow = -87.0f;
constexpr float kExpHigh = 88.0f;

template <typename F>
constexpr float kExpLeast = kTable<F> == 32 ? -110.0f : -88.0f;
template <typename F>
constexpr float kExpMost = kTable<F> == 32 ? 110.0f : 88.7f;

// Exp for x from kExpLeast to kExpMost, or NaN.
template <typename F>
VIM_INLINE F ExpInRange(F x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits: exact when multiplied by any number of 1/32 met here
  constexpr float kLn2Low = -2.12194440e-4f;
  const F biased = x * kLog2E + kRound<F>;
  const F whole = biased - kRound<F>;
  const F rest = (x - whole * kLn2High) - whole * kLn2Low;
  return Exp2Parts(rest * kLog2E, biased);
}

template <typename F>
VIM_INLINE F Exp(F x) {
  return ExpInRange(AtMost(AtLeast(x, kExpLeast<F>), kExpMost<F>));
}

// Relative error of Softplus for x >= -87. x itself above 20, as in PyTorch: what is added there rounds away.
constexpr double kSoftplusMaxRelativeError = 3.5e-7;

template <typename F>
VIM_INLINE F Softplus(F x) {
  const F minus_size = BitCast<F>(Bits(x) | 0x80000000u);
  const F e = ExpInRange(AtLeast(minus_size, kExpLeast<F>));  // in (0, 1]
  // log1p(e) / e, minimax on [0, 1]: 3.1e-8 before rounding. Without a division, which would take longer.
  F r = 0.0052326927f * e - 0.029505232f;
  r = r * e + 0.07822594f;
  r = r * e - 0.13663244f;
  r = r * e + 0.19106007f;
  r = r * e - 0.24842982f;
  r = r * e + 0.33319098f;
  r = r * e - 0.49999493f;
  r = r * e + 0.99999994f;
  return r * e + AtLeast(x, 0.0f);
}

// Relative error of Silu (x times the logistic function) for x >= -87; below -88.7 it is -0.
constexpr double kSiluMaxRelativeError = 2.7e-7;

template <typename F>
VIM_INLINE F Silu(F x) {
  return x / (1.0f + Exp(-x));
}

// fp16 and bf16 by arithmetic on 32-bit lanes, each holding one 16-bit value. (A NaN's payload apart, the same bits as
// the conversions that hardware has.)

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

// fp16 as it lies in memory, to fp32 and back: by hardware where the target has it.
template <int kWidth>
VIM_INLINE typename Vector<kWidth>::Float FromFloat16(typename Vector<kWidth>::Half h) {
  using F = typename Vector<kWidth>::Float;
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) return _mm512_maskz_cvtph_ps(0xffff, BitCast<__m256i>(h));
#endif
#if defined(__F16C__)
  if constexpr (kWidth == 8) return _mm256_cvtph_ps(BitCast<__m128i>(h));
#endif
#if defined(__aarch64__)
  if constexpr (kWidth == 4) return BitCast<F>(vcvt_f32_f16(BitCast<float16x4_t>(h)));
#endif
  return FromHalf<F>(__builtin_convertvector(h, typename Vector<kWidth>::Word));
}

template <int kWidth>
VIM_INLINE typename Vector<kWidth>::Half ToFloat16(typename Vector<kWidth>::Float x) {
  using H = typename Vector<kWidth>::Half;
#if defined(__AVX512F__)
  if constexpr (kWidth == 16)
    return BitCast<H>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__F16C__)
  if constexpr (kWidth == 8) return BitCast<H>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__aarch64__)
  if constexpr (kWidth == 4) return BitCast<H>(vcvt_f16_f32(BitCast<float32x4_t>(x)));
#endif
  return __builtin_convertvector(ToHalf(x), H);
}

}  // namespace vim::cpu

#endif  // VIM_CPU_MATH_H_
