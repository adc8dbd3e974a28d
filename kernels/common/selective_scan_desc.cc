// What a scan, of one direction or of both, may be, for every device: pure functions of the descriptor.
#include "common/desc.h"
#include "vim/bi_selective_scan.h"
#include "vim/selective_scan.h"

namespace {

using vim::kMaxExtent;
using vim::No;

constexpr int64_t kMaxStates = 256;

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
  if (!vim::CheckExtents(desc->io,
                         {
                             {"batch", desc->batch, 0, kMaxExtent},
                             {"length", desc->length, 0, kMaxExtent},
                             {"channels", desc->channels, 1, kMaxExtent},
                             {"states", desc->states, 1, kMaxStates},
                             {"groups", desc->groups, 1, desc->channels},
                         },
                         reason, reason_size))
    return 0;
  if (desc->channels % desc->groups != 0)
    return No(reason, reason_size, "groups is %" PRId64 ", which does not divide channels, %" PRId64, desc->groups,
              desc->channels);

  // Inputs may repeat or overlap; outputs that do would be written twice.
  if (desc->batch > 0 && desc->length > 1 && Magnitude(desc->y_token_stride) < desc->channels)
    return No(reason, reason_size, "y_token_stride is %" PRId64 "; it must be at least channels, %" PRId64,
              desc->y_token_stride, desc->channels);
  if (desc->batch > 1 && desc->length > 0 && Magnitude(desc->y_batch_stride) < desc->channels)
    return No(reason, reason_size, "y_batch_stride is %" PRId64 "; it must be at least channels, %" PRId64,
              desc->y_batch_stride, desc->channels);
  return 1;
}

void vim_bi_selective_scan_contiguous(vim_bi_selective_scan_desc* desc, int64_t row, int64_t z_row) {
  const int64_t channels = desc->channels;
  const int64_t token = row > 0 ? row : desc->groups * desc->states;
  for (int i = 0; i < 2; ++i) {
    desc->u_token_stride[i] = desc->delta_token_stride[i] = channels;
    desc->u_batch_stride[i] = desc->delta_batch_stride[i] = desc->length * channels;
    desc->B_token_stride[i] = desc->C_token_stride[i] = token;
    desc->B_batch_stride[i] = desc->C_batch_stride[i] = desc->length * token;
    desc->B_group_stride[i] = desc->C_group_stride[i] = desc->states;
  }
  desc->z_token_stride = z_row > 0 ? z_row : channels;
  desc->z_batch_stride = desc->length * desc->z_token_stride;
  desc->y_token_stride = channels;
  desc->y_batch_stride = desc->length * channels;
}

int vim_bi_selective_scan_supports(const vim_bi_selective_scan_desc* desc, char* reason, size_t reason_size) {
  // What is checked does not differ from one direction to the other.
  const vim_selective_scan_desc one = vim::OneDirection(*desc, 0);
  return vim_selective_scan_supports(&one, reason, reason_size);
}

}  // extern "C"
