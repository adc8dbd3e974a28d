// Element types that models read and write, and their conversion from and to float.
#ifndef VIMDEPLOY_SDK_ELEMENT_H_
#define VIMDEPLOY_SDK_ELEMENT_H_

#include <cstddef>
#include <cstdint>

namespace vimdeploy {

enum class Element { kFloat, kHalf, kBfloat16 };

inline std::size_t SizeOf(Element element) { return element == Element::kFloat ? 4 : 2; }

// Rounds to nearest, ties to even. `to` holds count elements of the type.
void FromFloat(const float* from, std::size_t count, Element element, void* to);
void ToFloat(const void* from, std::size_t count, Element element, float* to);

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_ELEMENT_H_
