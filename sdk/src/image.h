// A limit that reading and scaling share.
#ifndef VIMDEPLOY_SDK_IMAGE_H_
#define VIMDEPLOY_SDK_IMAGE_H_

#include <cstdint>

namespace vimdeploy {

// Pillow refuses images above twice its MAX_IMAGE_PIXELS; a file of some kB can claim any size.
constexpr std::int64_t kMaxPixels = 2 * std::int64_t{89478485};

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_IMAGE_H_
