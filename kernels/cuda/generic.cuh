// The form for everything the two fast ones do not take: any number of states up to 256, any groups, any strides.
// A warp walks the tokens of one row with the states across its lanes. Right, not fast.
#ifndef VIM_KERNELS_CUDA_GENERIC_CUH_
#define VIM_KERNELS_CUDA_GENERIC_CUH_

#include <type_traits>

#include "cuda/math.cuh"
#include "cuda/params.h"

namespace vim::cuda {

constexpr int kGenericWarps = 4;

// Scans direction 0 of `p`; adds to what y holds when add_to_y, gates and scales when `finish`.
template <typename IO, int kPerLane>
__global__ void __launch_bounds__(32 * kGenericWarps) GenericScan(const __grid_constant__ Params p, bool finish) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  const Direction& direction = p.direction[0];
  const int64_t row = int64_t{blockIdx.x} * kGenericWarps + threadIdx.x / 32;
  if (row >= int64_t{p.batch} * p.channels) return;
  const int64_t batch = row / p.channels;
  const int channel = static_cast<int>(row % p.channels);
  const int group = channel / p.channels_per_group;
  const int lane = threadIdx.x % 32;

  const Bits* u = static_cast<const Bits*>(direction.u) + batch * direction.u_batch + channel;
  const Bits* delta = static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch + channel;
  const Bits* B = static_cast<const Bits*>(direction.B) + batch * direction.B_batch + group * direction.B_group;
  const Bits* C = static_cast<const Bits*>(direction.C) + batch * direction.C_batch + group * direction.C_group;
  const Bits* z = p.z && finish ? static_cast<const Bits*>(p.z) + batch * p.z_batch + channel : nullptr;
  Bits* y = static_cast<Bits*>(p.y) + batch * p.y_batch + channel;
  const float skip = direction.D ? direction.D[channel] : 0.0f;
  const float bias = direction.delta_bias ? direction.delta_bias[channel] : 0.0f;
  const float scale = p.y_scale && finish ? p.y_scale[channel] : 1.0f;

  float A[kPerLane], state[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int n = i * 32 + lane;
    A[i] = n < p.states ? direction.A[int64_t{channel} * p.states + n] * kLog2e : 0.0f;
    state[i] = 0.0f;
  }
  for (int walk = 0; walk < p.length; ++walk) {
    const int64_t token = p.reverse ? p.length - 1 - walk : walk;
    const float x = E::ToFloat(u[token * direction.u_token]);
    float step = E::ToFloat(delta[token * direction.delta_token]) + bias;
    if (p.delta_softplus) step = Softplus<std::is_same_v<IO, float>>(step);
    const float gain = step * x;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int n = i * 32 + lane;
      if (n < p.states) {
        state[i] = fmaf(Decay<std::is_same_v<IO, float>>(step * A[i]), state[i],
                        gain * E::ToFloat(B[token * direction.B_token + n]));
        sum = fmaf(E::ToFloat(C[token * direction.C_token + n]), state[i], sum);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) {
      sum = fmaf(skip, x, sum);
      if (p.add_to_y) sum += E::ToFloat(y[token * p.y_token]);
      sum *= scale;
      if (z) sum *= Silu(E::ToFloat(z[token * p.z_token]));
      y[token * p.y_token] = E::FromFloat(sum);
    }
  }
}

template <typename IO>
cudaError_t LaunchGenericOnce(const Params& params, bool finish, cudaStream_t stream) {
  const int64_t blocks = (int64_t{params.batch} * params.channels + kGenericWarps - 1) / kGenericWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  if (params.states <= 32) {
    GenericScan<IO, 1><<<grid, 32 * kGenericWarps, 0, stream>>>(params, finish);
  } else if (params.states <= 64) {
    GenericScan<IO, 2><<<grid, 32 * kGenericWarps, 0, stream>>>(params, finish);
  } else {
    GenericScan<IO, 8><<<grid, 32 * kGenericWarps, 0, stream>>>(params, finish);
  }
  return cudaGetLastError();
}

template <typename IO>
cudaError_t LaunchGeneric(const Params& params, cudaStream_t stream) {
  Params one = params;
  if (params.pair) {
    one.direction[0] = params.direction[1];
    one.reverse = 1;
    one.add_to_y = 0;
    const cudaError_t error = LaunchGenericOnce<IO>(one, false, stream);
    if (error != cudaSuccess) return error;
    one.direction[0] = params.direction[0];
    one.reverse = 0;
    one.add_to_y = 1;
  }
  return LaunchGenericOnce<IO>(one, true, stream);
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_GENERIC_CUH_
