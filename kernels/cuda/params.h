// What every kernel form receives: one direction or two, in the terms of selective_scan_cuda.h.
#ifndef VIM_KERNELS_CUDA_PARAMS_H_
#define VIM_KERNELS_CUDA_PARAMS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "vim/selective_scan_cuda.h"

namespace vim::cuda {

struct Direction {
  const void* u;
  const void* delta;
  const void* B;
  const void* C;
  const float* A;
  const float* D;           // nullptr: no skip
  const float* delta_bias;  // nullptr: none
  int64_t u_batch, u_token;
  int64_t delta_batch, delta_token;
  int64_t B_batch, B_token, B_group;
  int64_t C_batch, C_token, C_group;
};

struct Params {
  Direction direction[2];  // [1] is used by pairs only
  const void* z;           // nullptr: no gate
  const float* y_scale;    // (channels), nullptr: none
  void* y;
  int64_t z_batch, z_token, y_batch, y_token;
  int batch, length, channels, states, groups;
  int channels_per_group;
  int pair;     // both directions: [0] forward, [1] reverse
  int reverse;  // of a single direction
  int delta_softplus;
  int add_to_y;              // generic form: y already holds the other direction
  int state_granule;         // lanes form: bytes that divide the rows of B and C: 16, or four states at least
  void* workspace;           // states form in chunks: Carry [batch][direction][chunk][channel][state]
  int chunks, chunk_tokens;  // the same; set by the launch
};

// What a chunk of the sequence makes of the states it begins with: decay times them, plus state.
struct Carry {
  float state, decay;
};

struct LaneShape {
  int split;       // as vim_scan_variant
  int directions;  // in one block
  int cluster;     // vim_scan_variant's apart
};

template <typename IO>
cudaError_t LaunchSequential(const Params& params, int channels_per_thread, cudaStream_t stream);
template <typename IO>
cudaError_t LaunchLanes(const Params& params, const vim_scan_variant& variant, cudaStream_t stream);
template <typename IO>
cudaError_t LaunchStates(const Params& params, const vim_scan_variant& variant, int sm, cudaStream_t stream);
template <typename IO>
cudaError_t LaunchGeneric(const Params& params, cudaStream_t stream);

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_PARAMS_H_
