// The scan's C interface: checks, then one launch.
#include "vim/selective_scan_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "common/desc.h"
#include "cuda/choose_variant.h"
#include "cuda/params.h"
#include "cuda/status.h"

namespace {

using vim::OneDirection;
using vim::cuda::Direction;
using vim::cuda::Params;
using vim::cuda::Sizes;

int ElementBytes(int32_t io) { return io == VIM_F32 ? 4 : 2; }

// The power of two, at most 16, that divides every one of the byte counts fed to it; and the longest of the rows.
class Alignment {
 public:
  void Feed(int64_t bytes) { all_ |= static_cast<uint64_t>(bytes); }
  void Feed(const void* pointer) { all_ |= reinterpret_cast<uintptr_t>(pointer); }
  void FeedRow(int64_t elements) { longest_row_ = std::max(longest_row_, std::abs(elements)); }
  int Bytes() const { return static_cast<int>(all_ & (~all_ + 1)); }
  int64_t longest_row() const { return longest_row_; }

 private:
  uint64_t all_ = 16;
  int64_t longest_row_ = 0;
};

// Strides of dimensions that are not walked say nothing of alignment.
void FeedStrides(const vim_selective_scan_desc& desc, int64_t batch_stride, int64_t token_stride, Alignment* to) {
  if (desc.batch > 1) to->Feed(batch_stride * ElementBytes(desc.io));
  if (desc.length > 1) to->Feed(token_stride * ElementBytes(desc.io));
  to->FeedRow(token_stride);
}

void FeedRows(const vim_selective_scan_desc& desc, Alignment* to) {
  to->Feed(desc.channels * ElementBytes(desc.io));
  FeedStrides(desc, desc.u_batch_stride, desc.u_token_stride, to);
  FeedStrides(desc, desc.delta_batch_stride, desc.delta_token_stride, to);
  FeedStrides(desc, desc.y_batch_stride, desc.y_token_stride, to);
  if (desc.has_z) FeedStrides(desc, desc.z_batch_stride, desc.z_token_stride, to);
}

void FeedStates(const vim_selective_scan_desc& desc, Alignment* to) {
  FeedStrides(desc, desc.B_batch_stride, desc.B_token_stride, to);
  FeedStrides(desc, desc.C_batch_stride, desc.C_token_stride, to);
  if (desc.groups > 1) {
    to->Feed(desc.B_group_stride * ElementBytes(desc.io));
    to->Feed(desc.C_group_stride * ElementBytes(desc.io));
  }
}

// What the choice of a variant looks at, and how B and C may be read.
struct Geometry {
  Sizes sizes = {};
  Alignment rows, states;

  explicit Geometry(const vim_selective_scan_desc& desc) {
    sizes.batch = desc.batch;
    sizes.length = desc.length;
    sizes.channels = desc.channels;
    sizes.states = desc.states;
    sizes.groups = desc.groups;
    sizes.element_bytes = ElementBytes(desc.io);
    sizes.workspace = true;  // until it is found that there is none
    FeedRows(desc, &rows);
    FeedStates(desc, &states);
    Update();
  }
  explicit Geometry(const vim_bi_selective_scan_desc& desc) : Geometry(OneDirection(desc, 0)) {
    sizes.pair = true;
    FeedRows(OneDirection(desc, 1), &rows);
    FeedStates(OneDirection(desc, 1), &states);
    Update();
  }
  void FeedPointers(const Params& params) {
    rows.Feed(params.y);
    rows.Feed(params.z);
    for (int i = 0; i <= params.pair; ++i) {
      rows.Feed(params.direction[i].u);
      rows.Feed(params.direction[i].delta);
      states.Feed(params.direction[i].B);
      states.Feed(params.direction[i].C);
    }
    Update();
  }
  void Update() {
    sizes.row_alignment = rows.Bytes();
    sizes.states_aligned = states.Bytes() >= 4 * sizes.element_bytes;
    sizes.longest_row = std::max(rows.longest_row(), states.longest_row());
  }
};

Direction DirectionOf(const vim_selective_scan_desc& desc, const void* u, const void* delta, const float* A,
                      const void* B, const void* C, const float* D, const float* delta_bias) {
  Direction direction = {};
  direction.u = u;
  direction.delta = delta;
  direction.A = A;
  direction.B = B;
  direction.C = C;
  direction.D = desc.has_D ? D : nullptr;
  direction.delta_bias = desc.has_delta_bias ? delta_bias : nullptr;
  direction.u_batch = desc.u_batch_stride;
  direction.u_token = desc.u_token_stride;
  direction.delta_batch = desc.delta_batch_stride;
  direction.delta_token = desc.delta_token_stride;
  direction.B_batch = desc.B_batch_stride;
  direction.B_token = desc.B_token_stride;
  direction.B_group = desc.B_group_stride;
  direction.C_batch = desc.C_batch_stride;
  direction.C_token = desc.C_token_stride;
  direction.C_group = desc.C_group_stride;
  return direction;
}

// What the directions have in common.
Params CommonParams(const vim_selective_scan_desc& desc, const void* z, void* y) {
  Params params = {};
  params.z = desc.has_z ? z : nullptr;
  params.y = y;
  params.z_batch = desc.z_batch_stride;
  params.z_token = desc.z_token_stride;
  params.y_batch = desc.y_batch_stride;
  params.y_token = desc.y_token_stride;
  params.batch = static_cast<int>(desc.batch);
  params.length = static_cast<int>(desc.length);
  params.channels = static_cast<int>(desc.channels);
  params.states = static_cast<int>(desc.states);
  params.groups = static_cast<int>(desc.groups);
  params.channels_per_group = static_cast<int>(desc.channels / desc.groups);
  params.reverse = desc.reverse;
  params.delta_softplus = desc.delta_softplus;
  return params;
}

cudaError_t CurrentSm(int* sm) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *sm = major * 10 + minor;
  return error;
}

template <typename IO>
cudaError_t LaunchForm(const Params& params, const vim_scan_variant& variant, int sm, cudaStream_t stream) {
  switch (variant.form) {
    case VIM_SCAN_SEQUENTIAL:
      return vim::cuda::LaunchSequential<IO>(params, variant.channels, stream);
    case VIM_SCAN_LANES:
      return vim::cuda::LaunchLanes<IO>(params, variant, stream);
    case VIM_SCAN_STATES:
      return vim::cuda::LaunchStates<IO>(params, variant, sm, stream);
    default:
      return vim::cuda::LaunchGeneric<IO>(params, stream);
  }
}

// `forced` may be null.
vim_status Run(Geometry geometry, Params params, int32_t io, const vim_scan_variant* forced, void* workspace,
               void* stream) {
  if (params.batch == 0 || params.length == 0) return VIM_OK;
  params.workspace = workspace;
  geometry.FeedPointers(params);
  params.state_granule = geometry.states.Bytes();
  geometry.sizes.workspace = workspace != nullptr;

  int sm = 0;
  const cudaError_t no_device = CurrentSm(&sm);
  if (no_device != cudaSuccess) return vim::cuda::StatusOf(no_device);
  const vim_scan_variant variant = forced != nullptr ? *forced : vim::cuda::Choose(geometry.sizes, sm);
  if (!vim::cuda::CanRun(variant, geometry.sizes, sm)) return VIM_UNSUPPORTED;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (io) {
    case VIM_F32:
      return vim::cuda::StatusOf(LaunchForm<float>(params, variant, sm, cuda_stream));
    case VIM_F16:
      return vim::cuda::StatusOf(LaunchForm<__half>(params, variant, sm, cuda_stream));
    default:
      return vim::cuda::StatusOf(LaunchForm<__nv_bfloat16>(params, variant, sm, cuda_stream));
  }
}

vim_status RunOne(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                  const vim_scan_variant* forced, void* workspace, void* stream) {
  if (!vim_selective_scan_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  Params params = CommonParams(*desc, args->z, args->y);
  params.direction[0] = DirectionOf(*desc, args->u, args->delta, args->A, args->B, args->C, args->D, args->delta_bias);
  return Run(Geometry(*desc), params, desc->io, forced, workspace, stream);
}

vim_status RunBoth(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                   const vim_scan_variant* forced, void* workspace, void* stream) {
  if (!vim_bi_selective_scan_supports(desc, nullptr, 0)) return VIM_UNSUPPORTED;
  Params params = CommonParams(OneDirection(*desc, 0), args->z, args->y);
  params.pair = 1;
  params.y_scale = desc->has_y_scale ? args->y_scale : nullptr;
  for (int i = 0; i < 2; ++i)
    params.direction[i] = DirectionOf(OneDirection(*desc, i), args->u[i], args->delta[i], args->A[i], args->B[i],
                                      args->C[i], args->D[i], args->delta_bias[i]);
  return Run(Geometry(*desc), params, desc->io, forced, workspace, stream);
}

}  // namespace

extern "C" {

vim_status vim_selective_scan_cuda(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                   void* workspace, void* stream) {
  return RunOne(desc, args, nullptr, workspace, stream);
}

size_t vim_selective_scan_cuda_workspace(const vim_selective_scan_desc* desc) {
  return vim::cuda::StatesSizes::Workspace(desc->batch * desc->channels, desc->length, desc->states);
}

vim_status vim_bi_selective_scan_cuda(const vim_bi_selective_scan_desc* desc, const vim_bi_selective_scan_args* args,
                                      void* workspace, void* stream) {
  return RunBoth(desc, args, nullptr, workspace, stream);
}

size_t vim_bi_selective_scan_cuda_workspace(const vim_bi_selective_scan_desc* desc) {
  return vim::cuda::StatesSizes::Workspace(2 * desc->batch * desc->channels, desc->length, desc->states);
}

vim_scan_variant vim_selective_scan_choose_variant(const vim_selective_scan_desc* desc, int sm) {
  return vim::cuda::Choose(Geometry(*desc).sizes, sm);
}

vim_scan_variant vim_bi_selective_scan_choose_variant(const vim_bi_selective_scan_desc* desc, int sm) {
  return vim::cuda::Choose(Geometry(*desc).sizes, sm);
}

vim_status vim_selective_scan_cuda_with(const vim_selective_scan_desc* desc, const vim_selective_scan_args* args,
                                        const vim_scan_variant* variant, void* workspace, void* stream) {
  return RunOne(desc, args, variant, workspace, stream);
}

vim_status vim_bi_selective_scan_cuda_with(const vim_bi_selective_scan_desc* desc,
                                           const vim_bi_selective_scan_args* args, const vim_scan_variant* variant,
                                           void* workspace, void* stream) {
  return RunBoth(desc, args, variant, workspace, stream);
}

}  // extern "C"
