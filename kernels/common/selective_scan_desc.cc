// What a scan may be, for every device: pure functions of the descriptor.
#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "vim/selective_scan.h"

namespace {

constexpr int64_t kMaxStates = 256;
constexpr int64_t kMaxExtent = INT32_MAX;

__attribute__((format(printf, 3, 4))) int No(char* reason, size_t reason_size, const char* format, ...) {
  if (reason != nullptr && reason_size > 0) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(reason, reason_size, format, arguments);
    va_end(arguments);
  }
  return 0;
}

int64_t Magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

}  // namespace

extern "C" {

void vim_selective_scan_contiguous(vim_selective_scan_desc* desc) {
  const int64_t channels = desc->channels;
  const int64_t states = desc->groups * desc->states;
  desc->u_token_stride = desc->delta_token_stride = desc->z_token_stride = desc->y_token_stride = channels;
  desc->u_batch_stride = desc->delta_batch_stride = desc->z_batch_stride = desc->y_batch_stride =
      desc->length * channels;
  desc->B_group_stride = desc->C_group_stride = desc->states;
  desc->B_token_stride = desc->C_token_stride = states;
  desc->B_batch_stride = desc->C_batch_stride = desc->length * states;
}

int vim_selective_scan_supports(const vim_selective_scan_desc* desc, char* reason, size_t reason_size) {
  if (reason != nullptr && reason_size > 0) reason[0] = '\0';

  if (desc->io != VIM_F32 && desc->io != VIM_F16 && desc->io != VIM_BF16)
    return No(reason, reason_size, "io is %" PRId32 "; it must be VIM_F32 (0), VIM_F16 (1) or VIM_BF16 (2)", desc->io);

  const struct {
    const char* name;
    int64_t value, lowest, highest;
  } extents[] = {
      {"batch", desc->batch, 0, kMaxExtent},       {"length", desc->length, 0, kMaxExtent},
      {"channels", desc->channels, 1, kMaxExtent}, {"states", desc->states, 1, kMaxStates},
      {"groups", desc->groups, 1, desc->channels},
  };
  for (const auto& extent : extents) {
    if (extent.value < extent.lowest || extent.value > extent.highest)
      return No(reason, reason_size, "%s is %" PRId64 "; it must be from %" PRId64 " to %" PRId64, extent.name,
                extent.value, extent.lowest, extent.highest);
  }
  if (desc->channels % desc->groups != 0)
    return No(reason, reason_size, "groups is %" PRId64 ", which does not divide channels, %" PRId64, desc->groups,
              desc->channels);

  // Inputs may repeat or overlap; outputs that do would be written twice.
  if (desc->length > 1 && Magnitude(desc->y_token_stride) < desc->channels)
    return No(reason, reason_size, "y_token_stride is %" PRId64 "; it must be at least channels, %" PRId64,
              desc->y_token_stride, desc->channels);
  if (desc->batch > 1 && desc->length > 0 && Magnitude(desc->y_batch_stride) < desc->channels)
    return No(reason, reason_size, "y_batch_stride is %" PRId64 "; it must be at least channels, %" PRId64,
              desc->y_batch_stride, desc->channels);
  return 1;
}

}  // extern "C"
