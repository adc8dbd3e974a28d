// Holds kernels/cpu/math.h to the bounds it states. Prints one line a function: name, largest error, bound.
//
//   check [STRIDE]    looks at every STRIDE-th float, 97 by default
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#include "cpu/math.h"

namespace {

// The functions under test work on vectors, as wide as the kernel's for this target; the first lane is looked at.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
using Float = vim::cpu::Vector<kWidth>::Float;
using Word = vim::cpu::Vector<kWidth>::Word;
using HalfVector = vim::cpu::Vector<kWidth>::Half;

Word Splat(uint32_t x) { return Word{} + x; }
Float Splat(float x) { return vim::cpu::BitCast<Float>(Splat(vim::cpu::BitCast<uint32_t>(x))); }

float FromBits(uint32_t bits) { return vim::cpu::BitCast<float>(bits); }
uint32_t Bits(float x) { return vim::cpu::BitCast<uint32_t>(x); }

float Exp2(float x) { return vim::cpu::Exp2(Splat(x))[0]; }
float Exp(float x) { return vim::cpu::Exp(Splat(x))[0]; }
float Softplus(float x) { return vim::cpu::Softplus(Splat(x))[0]; }
float Silu(float x) { return vim::cpu::Silu(Splat(x))[0]; }
float FromHalf(uint32_t h) { return vim::cpu::FromHalf<Float>(Splat(h))[0]; }
uint32_t ToHalf(float x) { return vim::cpu::ToHalf(Splat(x))[0]; }
// As the kernels convert, by hardware where there is some.
float LoadHalf(uint32_t h) { return vim::cpu::FromFloat16<kWidth>(HalfVector{} + static_cast<uint16_t>(h))[0]; }
uint32_t StoreHalf(float x) { return vim::cpu::ToFloat16<kWidth>(Splat(x))[0]; }
float FromBfloat16(uint32_t b) { return vim::cpu::FromBfloat16<Float>(Splat(b))[0]; }
uint32_t ToBfloat16(float x) { return vim::cpu::ToBfloat16(Splat(x))[0]; }

using vim::cpu::kExp2High, vim::cpu::kExp2Low, vim::cpu::kExp2MaxRelativeError;
using vim::cpu::kExpHigh, vim::cpu::kExpLow, vim::cpu::kExpMaxRelativeError;
using vim::cpu::kSiluMaxRelativeError, vim::cpu::kSoftplusMaxRelativeError;

int failures = 0;

void Check(const char* name, bool ok) {
  if (ok) return;
  std::printf("FAIL %s\n", name);
  ++failures;
}

uint32_t stride = 97;

// Walks the floats of [low, high] in steps of `stride` representable values.
template <typename F, typename Reference>
void Sweep(const char* name, float low, float high, double bound, F f, Reference reference) {
  double worst = 0.0;
  float worst_at = 0.0f;
  long compared = 0;
  const auto visit = [&](float x) {
    const double want = reference(static_cast<double>(x));
    if (std::fabs(want) < std::numeric_limits<float>::min()) return;
    const double error = std::fabs(static_cast<double>(f(x)) - want) / std::fabs(want);
    ++compared;
    if (!(error <= worst)) {
      worst = error;
      worst_at = x;
    }
  };
  if (low < 0.0f)
    for (uint32_t b = 0x80000000u; b <= Bits(low); b += stride) visit(FromBits(b));
  for (uint32_t b = 0; b <= Bits(high); b += stride) visit(FromBits(b));
  visit(low);
  visit(high);
  std::printf("%s %.3e at %.9g, bound %.3e, %ld compared\n", name, worst, worst_at, bound, compared);
  Check(name, compared > 1000 && worst <= bound);
}

void Specials() {
  const float infinity = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  Check("Exp2(0) is exactly 1", Exp2(0.0f) == 1.0f && Exp2(-0.0f) == 1.0f && Exp2(-tiny) == 1.0f);
  Check("Exp2 flushes to 0", Exp2(-200.0f) == 0.0f && Exp2(-infinity) == 0.0f);
  Check("Exp2 overflows to infinity", Exp2(200.0f) == infinity && Exp2(infinity) == infinity);
  Check("Exp flushes to 0", Exp(-1000.0f) < 1e-37f && Exp(-infinity) < 1e-37f);
  Check("Exp overflows to infinity", Exp(1000.0f) == infinity && Exp(infinity) == infinity);
  Check("Softplus is x above 20",
        Softplus(20.5f) == 20.5f && Softplus(80.0f) == 80.0f && Softplus(infinity) == infinity);
  Check("Softplus is small below", Softplus(-80.0f) > 0.0f && Softplus(-infinity) < 1e-37f);
  Check("Silu at the ends", Silu(80.0f) == 80.0f && Silu(-infinity) != Silu(-infinity) && Silu(-1e30f) == 0.0f);
  for (uint32_t payload = 1; payload < (1u << 22); payload += 13) {
    for (uint32_t head : {0x7fc00000u, 0xffc00000u}) {
      const float nan = FromBits(head | payload);
      if (!std::isnan(Exp2(nan)) || !std::isnan(Exp(nan)) || !std::isnan(Softplus(nan)) || !std::isnan(Silu(nan)))
        return Check("NaN in, NaN out, whatever its payload", false);
    }
  }
}

// Every 16-bit value survives the way to fp32 and back; every fp32 rounds to the nearest, ties to even.
void Halves() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint32_t half = h;
    const float x = FromHalf(half);
    const uint32_t exponent = (h >> 10) & 31u;
    const double want =
        exponent == 0 ? std::ldexp(h & 1023u, -24) : std::ldexp(1024u + (h & 1023u), int(exponent) - 25);
    if (exponent < 31) {
      Check("FromHalf is exact", std::fabs(x) == want && std::signbit(x) == (h >> 15 != 0));
      Check("ToHalf undoes FromHalf", ToHalf(x) == half);
      if (exponent < 30 && h < 0x8000) {
        const float next = FromHalf(h + 1);
        const float middle = 0.5f * (x + next);
        Check("ToHalf: ties to even", ToHalf(middle) == (h % 2 == 0 ? h : h + 1));
        Check("ToHalf: below the middle", ToHalf(std::nextafter(middle, 0.0f)) == h);
        Check("ToHalf: above the middle", ToHalf(std::nextafter(middle, 1e9f)) == h + 1);
      }
    } else {
      Check("FromHalf keeps infinity and NaN", (h & 1023u) ? std::isnan(x) : std::isinf(x));
      Check("ToHalf keeps infinity and NaN", (h & 1023u) ? std::isnan(FromHalf(ToHalf(x))) : ToHalf(x) == half);
    }
    Check("conversions by hardware are the same, NaN's payload apart",
          std::isnan(x) ? std::isnan(LoadHalf(half)) : Bits(LoadHalf(half)) == Bits(x) && StoreHalf(x) == half);
    const float y = FromBfloat16(half);
    Check("ToBfloat16 undoes FromBfloat16",
          std::isnan(y) ? std::isnan(FromBfloat16(ToBfloat16(y))) : ToBfloat16(y) == half);
    if (!std::isnan(y) && !std::isinf(y)) {
      Check("ToBfloat16: ties to even", ToBfloat16(FromBits(Bits(y) | 0x8000u)) == (h % 2 == 0 ? h : h + 1));
      Check("ToBfloat16: above the middle", ToBfloat16(FromBits(Bits(y) | 0x8001u)) == h + 1);
    }
    if (failures > 20) return;
  }
  Check("ToHalf: 65519 is the last finite",
        ToHalf(65519.0f) == 0x7bff && ToHalf(65520.0f) == 0x7c00 && ToHalf(1e30f) == 0x7c00);
  for (uint32_t b = 0; b < (255u << 23); b += stride) {
    const float x = FromBits(b);
    if (StoreHalf(x) != ToHalf(x) || StoreHalf(-x) != ToHalf(-x))
      return Check("rounding by hardware is the same", false);
  }
  Check("ToBfloat16: a NaN of low payload stays NaN", std::isnan(FromBfloat16(ToBfloat16(FromBits(0x7f800001u)))));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) stride = static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10));
  Sweep("Exp2", kExp2Low, kExp2High, kExp2MaxRelativeError, Exp2, [](double x) { return std::exp2(x); });
  Sweep("Exp", kExpLow, kExpHigh, kExpMaxRelativeError, Exp, [](double x) { return std::exp(x); });
  Sweep("Softplus", -87.0f, 100.0f, kSoftplusMaxRelativeError, Softplus,
        [](double x) { return x > 20 ? x : std::log1p(std::exp(x)); });
  Sweep("Silu", -87.0f, 100.0f, kSiluMaxRelativeError, Silu, [](double x) { return x / (1 + std::exp(-x)); });
  Specials();
  Halves();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
