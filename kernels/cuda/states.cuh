// Form (iii): a row's states lie across lanes, so that few rows keep many lanes busy and no row is ever scanned twice.
//
// A row is one channel of one direction. kLanes lanes walk its tokens side by side, each with 16 / kLanes of the states
// in registers: five instructions a state and token, the least there is, and a chain of one FMA a token. The lanes'
// parts of y are summed kLanes tokens at a time by a reduction that leaves each lane one token's sum (kLanes - 1
// shuffles).
//
// Everything that is not the recurrence is done by helper warps of the same block, a tile ahead or a tile behind: B and
// C to fp32 and transposed, Delta through its softplus, Delta u; then D u, the partner's part, the gate and the
// rounding. Scanning warps and helpers meet at one barrier a tile; helpers hold what they load from global memory in
// registers for a whole tile before they use it, so its latency is never waited for.
//
//   step i:   scanning warps   tile i
//             helpers          prepare tile i + 1;  finish tile i - 1;  load tile i + 2
//
// A pair is two directions in one block. They walk the same tiles from opposite ends: whoever meets a tile first leaves
// its part in y, the other adds, gates and finishes it. Zeros fill a ragged tile, as in the sequential form.
#ifndef VIM_KERNELS_CUDA_STATES_CUH_
#define VIM_KERNELS_CUDA_STATES_CUH_

#include <type_traits>

#include "cuda/choose_variant.h"
#include "cuda/math.cuh"
#include "cuda/params.h"

namespace vim::cuda {

// What a direction keeps in shared memory. Each array is there twice: one tile is scanned while the next is prepared
// and the last is finished. Rows are tokens in walking order.
template <int kChannels, int kTile>
struct alignas(16) StatesShared {
  static constexpr int kPitch = kTile + StatesSizes::kPad;
  float states[2][2 * kStates][kPitch];  // B, then C
  float step[2][kChannels][kPitch];      // Delta
  float gain[2][kChannels][kPitch];      // Delta u
  float out[2][kChannels][kPitch];
};

// Sums y[i] over the kLanes lanes of a row, kStride lanes apart; `part` is the caller's place among them, and the
// result is the sum of y[part].
template <int kLanes, int kStride>
__device__ __forceinline__ float ReduceScatter(const float* y, int part) {
  if constexpr (kLanes == 1) {
    return y[0];
  } else {
    constexpr int kHalf = kLanes / 2;
    const bool upper = part & kHalf;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float send = upper ? y[i] : y[i + kHalf];
      const float keep = upper ? y[i + kHalf] : y[i];
      half[i] = keep + __shfl_xor_sync(0xffffffffu, send, kHalf * kStride);
    }
    return ReduceScatter<kHalf, kStride>(half, part);
  }
}

// The scanning warps' part. `thread` counts within the direction.
template <typename IO, int kLanes, int kChannels, int kTile>
__device__ __forceinline__ void ScanTiles(const Params& p, const Direction& direction,
                                          StatesShared<kChannels, kTile>& shared, int thread, int first_channel,
                                          int tiles, int middle) {
  constexpr int kRowsPerWarp = 32 / kLanes;
  constexpr int kOwn = kStates / kLanes;           // states a lane
  constexpr int kGroup = kLanes < 4 ? 4 : kLanes;  // tokens whose parts of y are held
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  const int lane = threadIdx.x & 31;
  // The rows of a warp are interleaved: neighbours read the same B and C.
  const int row = thread / 32 * kRowsPerWarp + lane % kRowsPerWarp;
  const int part = lane / kRowsPerWarp;

  float A[kOwn], state[kOwn];
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t channel = min(first_channel + row, p.channels - 1);
    A[m] = direction.A[channel * kStates + part + m * kLanes] * kLog2e;
    state[m] = 0.0f;
  }

  __syncthreads();
#pragma unroll 1
  for (int walk = 0; walk <= tiles; ++walk) {
    if (walk < tiles) {
      const int buffer = walk & 1;
      const float* const steps = shared.step[buffer][row];
      const float* const gains = shared.gain[buffer][row];
#pragma unroll
      for (int from = 0; from < kTile; from += kGroup) {
        float y[kGroup];
#pragma unroll
        for (int quad = 0; quad < kGroup; quad += 4) {
          const float4 step4 = *reinterpret_cast<const float4*>(steps + from + quad);
          const float4 gain4 = *reinterpret_cast<const float4*>(gains + from + quad);
          const float step[4] = {step4.x, step4.y, step4.z, step4.w}, gain[4] = {gain4.x, gain4.y, gain4.z, gain4.w};
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
            const float* const states = shared.states[buffer][part + m * kLanes] + from + quad;
            const float4 b4 = *reinterpret_cast<const float4*>(states);
            const float4 c4 = *reinterpret_cast<const float4*>(states + kStates * shared.kPitch);
            const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              state[m] = fmaf(Decay<kFloat32>(step[t] * A[m]), state[m], gain[t] * b[t]);
              y[quad + t] = m == 0 ? c[t] * state[m] : fmaf(c[t], state[m], y[quad + t]);
            }
          }
        }
#pragma unroll
        for (int token = 0; token < kGroup; token += kLanes)
          shared.out[buffer][row][from + token + part] = ReduceScatter<kLanes, kRowsPerWarp>(y + token, part);
      }
    }
    if (walk == middle + 1) __syncthreads();
    __syncthreads();
  }
}

// The helpers' part: kItems times four channels of a token, and kStateItems times four states of four tokens, a thread.
template <typename IO, int kChannels, int kTile, int kItems>
__device__ __forceinline__ void PrepareAndFinish(const Params& p, const Direction& direction, bool reverse,
                                                 StatesShared<kChannels, kTile>& shared, int thread, int64_t batch,
                                                 int first_channel, int tiles, int middle) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  using Bits4 = typename E::Bits4;
  constexpr int kPieces = kChannels / 4;
  constexpr int kThreads = kTile * kPieces / kItems;
  constexpr int kStateItems = (2 * kTile + kThreads - 1) / kThreads;
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  static_assert(kTile * kPieces % kItems == 0 && kThreads % 32 == 0 && kTile % 32 == 0);
  static_assert(kThreads % kPieces == 0, "a thread keeps its channels");

  const int piece = thread % kPieces * 4;
  const int channel = first_channel + piece;
  const bool inside = channel < p.channels;
  const int first_row = thread / kPieces;
  constexpr int kRowStep = kThreads / kPieces;
  float skip[4] = {}, bias[4] = {}, scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (inside && direction.D) skip[e] = direction.D[channel + e];
    if (inside && direction.delta_bias) bias[e] = direction.delta_bias[channel + e];
    if (inside && p.y_scale) scale[e] = p.y_scale[channel + e];
  }

  // Row r of tile w is token w kTile + r, or (tiles - w) kTile - 1 - r backwards. Each pointer stands at this thread's
  // first row of the tile to load, prepare or finish next, and moves on by a tile.
  const int sign = reverse ? -1 : 1;
  const int first_token = reverse ? tiles * kTile - 1 : 0;
  const int own_token = first_token + sign * first_row;
  int load_token = own_token, finish_token = own_token;
  const Bits* u =
      static_cast<const Bits*>(direction.u) + batch * direction.u_batch + channel + own_token * direction.u_token;
  const Bits* delta = static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch + channel +
                      own_token * direction.delta_token;
  const Bits* z = static_cast<const Bits*>(p.z);
  if (p.z) z += batch * p.z_batch + channel + own_token * p.z_token;
  Bits* y = static_cast<Bits*>(p.y) + batch * p.y_batch + channel + own_token * p.y_token;
  const int64_t u_row = sign * kRowStep * direction.u_token, delta_row = sign * kRowStep * direction.delta_token;
  const int64_t z_row = sign * kRowStep * p.z_token, y_row = sign * kRowStep * p.y_token;

  // Of B and C, four states of four tokens an item: states 4 four ..., tokens from `states_row` on.
  const int scan_group = first_channel / p.channels_per_group;
  const Bits* states[kStateItems];
  int64_t states_token[kStateItems];
  auto four_of = [&](int j) { return (thread + j * kThreads) / 8 % 8; };
  auto states_row = [&](int j) { return ((thread + j * kThreads) / 64 * 8 + thread % 8) * 4; };
  auto has_states = [&](int j) { return thread + j * kThreads < 2 * kTile; };
#pragma unroll
  for (int j = 0; j < kStateItems; ++j) {
    const int four = four_of(j);
    states_token[j] = sign * (four < 4 ? direction.B_token : direction.C_token);
    states[j] = (four < 4 ? static_cast<const Bits*>(direction.B) + batch * direction.B_batch +
                                scan_group * direction.B_group + four * 4
                          : static_cast<const Bits*>(direction.C) + batch * direction.C_batch +
                                scan_group * direction.C_group + (four - 4) * 4) +
                (sign * first_token + states_row(j)) * states_token[j];
  }
  int states_first = first_token;  // token of row 0 of the tile to load

  struct Raw {
    Bits4 u[kItems], delta[kItems], states[kStateItems][4];
  } raw;
  auto load = [&] {
    raw = {};
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (inside && load_token + sign * j * kRowStep < p.length) {
        raw.u[j] = *reinterpret_cast<const Bits4*>(u + j * u_row);
        raw.delta[j] = *reinterpret_cast<const Bits4*>(delta + j * delta_row);
      }
    }
#pragma unroll
    for (int j = 0; j < kStateItems; ++j) {
      const int token = states_first + sign * states_row(j);
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (has_states(j) && token + sign * t < p.length)
          raw.states[j][t] = *reinterpret_cast<const Bits4*>(states[j] + t * states_token[j]);
      states[j] += kTile * states_token[j];
    }
    load_token += sign * kTile;
    states_first += sign * kTile;
    u += sign * kTile * direction.u_token;
    delta += sign * kTile * direction.delta_token;
  };

  auto prepare = [&](int walk) {
    const int buffer = walk & 1;
#pragma unroll
    for (int j = 0; j < kStateItems; ++j) {
      if (!has_states(j)) break;
      float4 value[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) value[t] = E::ToFloat4(raw.states[j][t]);
      StoreTransposed(&shared.states[buffer][four_of(j) * 4][states_row(j)], shared.kPitch, value);
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int row = first_row + j * kRowStep;
      const float4 u4 = E::ToFloat4(raw.u[j]), delta4 = E::ToFloat4(raw.delta[j]);
      const float each[4] = {u4.x, u4.y, u4.z, u4.w};
      float step[4] = {delta4.x + bias[0], delta4.y + bias[1], delta4.z + bias[2], delta4.w + bias[3]};
      if (p.delta_softplus) {
#pragma unroll
        for (int e = 0; e < 4; ++e) step[e] = Softplus<kFloat32>(step[e]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        shared.step[buffer][piece + e][row] = step[e];
        shared.gain[buffer][piece + e][row] = step[e] * each[e];
      }
    }
  };

  // Of the tile to finish: z, and what the partner left in y.
  Bits4 gate[kItems], other[kItems];
  auto load_other = [&] {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (inside && finish_token + sign * j * kRowStep < p.length)
        other[j] = *reinterpret_cast<const Bits4*>(y + j * y_row);
  };
  auto load_gate = [&] {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (p.z && inside && finish_token + sign * j * kRowStep < p.length)
        gate[j] = *reinterpret_cast<const Bits4*>(z + j * z_row);
  };
  auto finish = [&](int walk, bool first, const Bits4(&raw_u)[kItems]) {
    const int buffer = walk & 1;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int row = first_row + j * kRowStep;
      const float4 u4 = E::ToFloat4(raw_u[j]);
      const float each[4] = {u4.x, u4.y, u4.z, u4.w};
      float value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] = fmaf(skip[e], each[e], shared.out[buffer][piece + e][row]);
      if (!first) {
        const float4 other4 = E::ToFloat4(other[j]), gate4 = E::ToFloat4(gate[j]);
        const float rest[4] = {other4.x, other4.y, other4.z, other4.w};
        const float through[4] = {gate4.x, gate4.y, gate4.z, gate4.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = (value[e] + rest[e]) * scale[e];
        if (p.z) {
#pragma unroll
          for (int e = 0; e < 4; ++e) value[e] *= Silu(through[e]);
        }
      }
      if (inside && finish_token + sign * j * kRowStep < p.length)
        *reinterpret_cast<Bits4*>(y + j * y_row) = E::FromFloat4(make_float4(value[0], value[1], value[2], value[3]));
    }
    finish_token += sign * kTile;
    z += sign * kTile * p.z_token;
    y += sign * kTile * p.y_token;
  };

  Bits4 u_scanned[kItems] = {}, u_done[kItems];
  auto rotate_and_load = [&](int walk) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      u_done[j] = u_scanned[j];
      u_scanned[j] = raw.u[j];
    }
    if (walk < tiles) load();
  };
  load();
  prepare(0);
  rotate_and_load(1);
  __syncthreads();
#pragma unroll 1
  for (int walk = 0; walk <= tiles; ++walk) {
    // The tile to finish: whether this direction is the first of its pair to meet it, forward being the first where
    // both do at once; then reverse waits for it.
    const int done = walk - 1;
    const bool first = p.pair && (done < tiles / 2 || (done == middle && !reverse));
    const bool meets = done == middle;
#pragma unroll
    for (int j = 0; j < kItems; ++j) gate[j] = other[j] = {};
    if (!first) {
      load_gate();
      if (p.pair && !meets) load_other();
    }
    if (walk + 1 < tiles) prepare(walk + 1);
    if (meets && reverse) {
      __syncthreads();
      load_other();
    }
    if (done >= 0) finish(done, first, u_done);
    if (meets && !reverse) __syncthreads();
    rotate_and_load(walk + 2);
    __syncthreads();
  }
}

template <int kLanes, int kChannels, int kTile, int kItems>
struct StatesThreads {  // of a direction
  static constexpr int kScanning = StatesSizes::Scanning(kLanes, kChannels);
  static constexpr int kHelping = StatesSizes::Helping(kChannels, kTile, kItems);
};

template <typename IO, int kLanes, int kChannels, int kTile, int kItems, int kBlocks>
__global__ void __launch_bounds__(StatesSizes::Threads(kLanes, kChannels, kTile, kItems, 2), kBlocks)
    StatesScan(const __grid_constant__ Params p) {
  using Shared = StatesShared<kChannels, kTile>;
  using Threads = StatesThreads<kLanes, kChannels, kTile, kItems>;
  constexpr int kScanning = Threads::kScanning, kHelping = Threads::kHelping;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared* const shared = reinterpret_cast<Shared*>(shared_memory);

  const int channel_blocks = (p.channels + kChannels - 1) / kChannels;
  const int64_t batch = blockIdx.x / channel_blocks;
  const int first_channel = blockIdx.x % channel_blocks * kChannels;
  const int tiles = (p.length + kTile - 1) / kTile;
  // The tile both directions come to at the same step, or none.
  const int middle = p.pair && tiles % 2 == 1 ? tiles / 2 : -2;

  const int scanning = kScanning << p.pair;
  const int thread = threadIdx.x;
  if (thread < scanning) {
    const int side = thread >= kScanning;
    ScanTiles<IO, kLanes, kChannels, kTile>(p, p.direction[side], shared[side], thread - side * kScanning,
                                            first_channel, tiles, middle);
  } else {
    const int side = thread - scanning >= kHelping;
    PrepareAndFinish<IO, kChannels, kTile, kItems>(p, p.direction[side], p.pair ? side == 1 : p.reverse != 0,
                                                   shared[side], thread - scanning - side * kHelping, batch,
                                                   first_channel, tiles, middle);
  }
}

template <typename IO, int kLanes, int kChannels, int kTile, int kItems, int kBlocks>
cudaError_t LaunchStatesAs(const Params& params, cudaStream_t stream) {
  const int directions = params.pair ? 2 : 1;
  const size_t shared = directions * StatesSizes::Bytes(kChannels, kTile);
  static_assert(sizeof(StatesShared<kChannels, kTile>) == StatesSizes::Bytes(kChannels, kTile), "one formula");
  const int64_t blocks = int64_t{(params.channels + kChannels - 1) / kChannels} * params.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = StatesScan<IO, kLanes, kChannels, kTile, kItems, kBlocks>;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const int threads = StatesSizes::Threads(kLanes, kChannels, kTile, kItems, directions);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(params);
  return cudaGetLastError();
}

template <typename IO>
cudaError_t LaunchStates(const Params& params, const vim_scan_variant& variant, cudaStream_t stream) {
#define VIM_STATES(lanes_, channels_, tile_, items_, blocks_)                                                         \
  if (variant.lanes == lanes_ && variant.channels == channels_ && variant.tokens == tile_ && variant.split == items_) \
    return LaunchStatesAs<IO, lanes_, channels_, tile_, items_, blocks_>(params, stream);
  VIM_STATES_INSTANCES(VIM_STATES)
#undef VIM_STATES
  return cudaErrorInvalidValue;
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_STATES_CUH_
