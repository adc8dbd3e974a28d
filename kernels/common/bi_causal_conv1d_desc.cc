// What the short convolution may be, for every device.
#include "common/desc.h"
#include "vim/bi_causal_conv1d.h"

namespace {

constexpr int64_t kMaxTaps = 16;  // a trained Vim has 4

}  // namespace

extern "C" int vim_bi_causal_conv1d_supports(const vim_bi_causal_conv1d_desc* desc, char* reason, size_t reason_size) {
  return vim::CheckExtents(desc->io,
                           {
                               {"batch", desc->batch, 0, vim::kMaxExtent},
                               {"length", desc->length, 0, vim::kMaxExtent},
                               {"channels", desc->channels, 1, vim::kMaxExtent},
                               {"taps", desc->taps, 1, kMaxTaps},
                           },
                           reason, reason_size);
}
