// What the checks of descriptors share.
#ifndef VIM_COMMON_DESC_H_
#define VIM_COMMON_DESC_H_

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "vim/bi_selective_scan.h"
#include "vim/selective_scan.h"

namespace vim {

constexpr int64_t kMaxExtent = INT32_MAX;

// A reason into the caller's buffer, cut to its size; 0, to be returned.
__attribute__((format(printf, 3, 4))) inline int No(char* reason, size_t reason_size, const char* format, ...) {
  if (reason != nullptr && reason_size > 0) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(reason, reason_size, format, arguments);
    va_end(arguments);
  }
  return 0;
}

struct Extent {
  const char* name;
  int64_t value, lowest, highest;
};

// The type and the extents, which every descriptor has. Empties `reason` first.
inline int CheckExtents(int32_t io, std::initializer_list<Extent> extents, char* reason, size_t reason_size) {
  if (reason != nullptr && reason_size > 0) reason[0] = '\0';
  if (io != VIM_F32 && io != VIM_F16 && io != VIM_BF16)
    return No(reason, reason_size, "io is %" PRId32 "; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)", io);
  for (const Extent& extent : extents) {
    if (extent.value < extent.lowest || extent.value > extent.highest)
      return No(reason, reason_size, "%s is %" PRId64 "; it must be from %" PRId64 " to %" PRId64, extent.name,
                extent.value, extent.lowest, extent.highest);
  }
  return 1;
}

// One direction of both, as a scan of its own: 0 the forward one, 1 the reverse one. What belongs to the pair, z and
// y_scale, is left to the caller but for z's strides.
inline vim_selective_scan_desc OneDirection(const vim_bi_selective_scan_desc& desc, int i) {
  vim_selective_scan_desc one = {};
  one.batch = desc.batch;
  one.length = desc.length;
  one.channels = desc.channels;
  one.states = desc.states;
  one.groups = desc.groups;
  one.io = desc.io;
  one.delta_softplus = desc.delta_softplus;
  one.reverse = i;
  one.has_D = desc.has_D;
  one.has_z = desc.has_z;
  one.has_delta_bias = desc.has_delta_bias;
  one.u_batch_stride = desc.u_batch_stride[i];
  one.u_token_stride = desc.u_token_stride[i];
  one.delta_batch_stride = desc.delta_batch_stride[i];
  one.delta_token_stride = desc.delta_token_stride[i];
  one.z_batch_stride = desc.z_batch_stride;
  one.z_token_stride = desc.z_token_stride;
  one.B_batch_stride = desc.B_batch_stride[i];
  one.B_token_stride = desc.B_token_stride[i];
  one.B_group_stride = desc.B_group_stride[i];
  one.C_batch_stride = desc.C_batch_stride[i];
  one.C_token_stride = desc.C_token_stride[i];
  one.C_group_stride = desc.C_group_stride[i];
  one.y_batch_stride = desc.y_batch_stride;
  one.y_token_stride = desc.y_token_stride;
  return one;
}

}  // namespace vim

#endif  // VIM_COMMON_DESC_H_
