// What the residual add and RMSNorm may be, for every device.
#include "common/desc.h"
#include "vim/add_rms_norm.h"

extern "C" int vim_add_rms_norm_supports(const vim_add_rms_norm_desc* desc, char* reason, size_t reason_size) {
  if (!vim::CheckExtents(desc->io,
                         {
                             {"rows", desc->rows, 0, INT64_MAX},
                             {"channels", desc->channels, 1, vim::kMaxExtent},
                         },
                         reason, reason_size))
    return 0;
  // The comparison is false for a NaN.
  if (!(desc->epsilon >= 0.0f && desc->epsilon <= 3.4e38f))
    return vim::No(reason, reason_size, "epsilon is %g; it must be finite and not negative",
                   static_cast<double>(desc->epsilon));
  return 1;
}
