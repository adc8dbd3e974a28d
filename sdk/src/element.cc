#include "element.h"

#include <cmath>
#include <cstring>

namespace vimdeploy {
namespace {

std::uint32_t Bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t ToHalf(float value) {
  const auto sign = static_cast<std::uint16_t>(Bits(value) >> 16 & 0x8000);
  const float magnitude = std::abs(value);
  if (std::isnan(value)) return sign | 0x7E00;
  if (magnitude >= 65520.0f) return sign | 0x7C00;  // halfway from the largest half to the next power of two
  if (magnitude < 0x1p-14f) {                       // subnormal: a multiple of 2^-24, which nearbyint finds
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24f)));
  }
  const std::uint32_t bits = Bits(magnitude) - (112u << 23);  // the exponent's bias: 127 - 15
  const std::uint32_t rounded = bits + 0x0FFF + (bits >> 13 & 1);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

float FromHalf(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16;
  const std::uint32_t exponent = half >> 10 & 31;
  const std::uint32_t mantissa = half & 0x3FF;
  if (exponent == 31) return FromBits(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, FromBits(sign | 0x3F800000));
  return FromBits(sign | (exponent + 112) << 23 | mantissa << 13);
}

std::uint16_t ToBfloat16(float value) {
  const std::uint32_t bits = Bits(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void FromFloat(const float* from, std::size_t count, Element element, void* to) {
  if (element == Element::kFloat) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* const narrow = static_cast<std::uint16_t*>(to);
  for (std::size_t i = 0; i < count; ++i) narrow[i] = element == Element::kHalf ? ToHalf(from[i]) : ToBfloat16(from[i]);
}

void ToFloat(const void* from, std::size_t count, Element element, float* to) {
  if (element == Element::kFloat) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const auto* const narrow = static_cast<const std::uint16_t*>(from);
  for (std::size_t i = 0; i < count; ++i)
    to[i] = element == Element::kHalf ? FromHalf(narrow[i]) : FromBits(std::uint32_t{narrow[i]} << 16);
}

}  // namespace vimdeploy
