// Form (ii): a row's tokens lie across lanes, so that one row keeps a whole warp, or a half or quarter of one, busy.
//
// A row is one channel of one direction. kLanes lanes hold kTokens consecutive tokens each; that is a chunk, and a row
// walks its chunks in order. For one state after another:
//   decays      a_t = 2^(Delta_t A'), kept in registers
//   own end     s = a_t s + x_t over the lane's tokens, from 0 (from the chunk's carry in lane 0)
//   warp scan   log2(kLanes) shuffles of (decay over the lane, s)
//   outputs     the recurrence again from the state that enters the lane, now with y_t += C_t s_t
// The second pass is two FMAs a token: the exponentials are computed once. A block takes `channels` rows a direction,
// so that global rows are read in whole sectors and B and C are converted to fp32 once for all of them. Warps may split
// the 16 states of a row between them (`split`), each adding its part of y.
//
// A pair is two directions in one block, or in two blocks of a cluster. They walk the same chunks from opposite ends:
// whoever meets a chunk first leaves its part in y, and after one barrier half way each adds, gates and finishes what
// the other left. Zeros fill a ragged chunk, as in the sequential form.
#ifndef VIM_KERNELS_CUDA_LANES_CUH_
#define VIM_KERNELS_CUDA_LANES_CUH_

#include <type_traits>

#include "cuda/choose_variant.h"
#include "cuda/copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/params.h"

namespace vim::cuda {

// What a direction keeps in shared memory; the outputs of each split follow it.
template <typename IO, int kTokens, int kLanes, int kChannels>
struct LanesShared {
  using Bits = typename Element<IO>::Bits;
  using Sizes = LanesSizes;
  static constexpr int kChunk = kTokens * kLanes;
  static constexpr int kQuads = Sizes::Quads(kTokens);
  static constexpr int kQuadFloats = Sizes::QuadFloats(kLanes);
  static constexpr int kPlaneFloats = kQuads * kQuadFloats;
  static constexpr int kRowElements = Sizes::RowElements(sizeof(IO));
  static constexpr int kLaneElements = Sizes::LaneElements(kTokens, kLanes, kChannels, sizeof(IO));
  static constexpr int kPiece = Sizes::Piece(kChannels, sizeof(IO));
  static constexpr int kOutputPitch = kChannels + 1;
  static constexpr int kOutputLane = Sizes::OutputLane(kTokens, kChannels);
  static constexpr int kOutputFloats = Sizes::OutputFloats(kTokens, kLanes, kChannels);

  float planes[2 * kStates * kPlaneFloats];            // fp32 B and C: [state][quad][lane][4 tokens]
  float decays[kChannels][kStates];                    // A log2(e)
  float carries[kChannels][kStates];                   // states at the end of the chunk before
  alignas(16) Bits rows[kChunk * kRowElements];        // B and C as they came: [token][16 B, 16 C]
  alignas(16) Bits inputs[2][kLanes * kLaneElements];  // u, delta as they came: [lane][token][channel]

  alignas(16) Bits late[2][kChunk * kChannels];  // z and the partner's y of the chunk being scanned

  static constexpr size_t Bytes(int split) { return sizeof(LanesShared) + split * kOutputFloats * sizeof(float); }
};

// One step of the inclusive scan of (decay, state) over the lanes of a row.
__device__ __forceinline__ void ScanStep(float& decay, float& state, int offset) {
  asm volatile(
      "{ .reg .pred in; .reg .f32 d, s;\n"
      "shfl.sync.up.b32 s|in, %1, %2, 0, 0xffffffff;\n"
      "shfl.sync.up.b32 d, %0, %2, 0, 0xffffffff;\n"
      "@in fma.rn.f32 %1, %0, s, %1;\n"
      "@in mul.f32 %0, %0, d; }"
      : "+f"(decay), "+f"(state)
      : "r"(offset));
}

// The value of the lane before, or `first` in a row's first lane.
__device__ __forceinline__ float FromLaneBefore(float value, float first, int offset) {
  asm volatile(
      "{ .reg .pred in; .reg .f32 v;\n"
      "shfl.sync.up.b32 v|in, %1, %2, 0, 0xffffffff;\n"
      "@in mov.f32 %0, v; }"
      : "+f"(first)
      : "f"(value), "r"(offset));
  return first;
}

__device__ __forceinline__ void ClusterBarrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <typename IO, int kTokens, int kLanes, int kChannels>
__global__ void __launch_bounds__(kLanesMaxThreads, 1)
    LanesScan(const __grid_constant__ Params p, const LaneShape shape) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  using Shared = LanesShared<IO, kTokens, kLanes, kChannels>;
  constexpr int kRowsPerWarp = 32 / kLanes;
  constexpr int kChunk = Shared::kChunk;
  constexpr int kPiece = Shared::kPiece;       // elements moved at a time
  constexpr int kPieces = kChannels / kPiece;  // of a row
  constexpr int kTogether = 2;                 // states at once: the latency of one's shuffles hides behind the other
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  extern __shared__ __align__(16) unsigned char shared_memory[];

  const int threads = blockDim.x / shape.directions;  // a direction's
  const int local_side = shape.directions == 2 && threadIdx.x >= threads ? 1 : 0;
  const int thread = threadIdx.x - local_side * threads;
  const int side = shape.cluster ? blockIdx.x & 1 : local_side;
  const Direction& direction = p.direction[side];
  const bool reverse = p.pair ? side == 1 : p.reverse != 0;

  const int channel_blocks = (p.channels + kChannels - 1) / kChannels;
  const int block = shape.cluster ? blockIdx.x >> 1 : blockIdx.x;
  const int64_t batch = block / channel_blocks;
  const int first_channel = block % channel_blocks * kChannels;
  const int channels_left = p.channels - first_channel;

  constexpr int kOutputFloats = Shared::kOutputFloats;
  unsigned char* const base = shared_memory + local_side * (sizeof(Shared) + shape.split * kOutputFloats * 4);
  Shared& shared = *reinterpret_cast<Shared*>(base);
  float* const outputs = reinterpret_cast<float*>(base + sizeof(Shared));

  // This thread's row: warps go over the block's channels, then over the splits.
  const int lane = threadIdx.x & 31;
  // The rows of a warp are interleaved: neighbours read the same B and C, which shared memory then serves at once.
  const int row_lane = lane / kRowsPerWarp;
  constexpr int kRowWarps = kChannels / kRowsPerWarp;
  const int channel = thread / 32 % kRowWarps * kRowsPerWarp + lane % kRowsPerWarp;  // in the block
  const int part = thread / 32 / kRowWarps;
  const int global_channel = min(first_channel + channel, p.channels - 1);
  const float skip = part == 0 && direction.D ? direction.D[global_channel] : 0.0f;
  const float bias = direction.delta_bias ? direction.delta_bias[global_channel] : 0.0f;

  for (int i = thread; i < kChannels * kStates; i += threads) {
    const int c = min(first_channel + i / kStates, p.channels - 1);
    shared.decays[0][i] = direction.A[int64_t{c} * kStates + i % kStates] * kLog2e;
    shared.carries[0][i] = 0.0f;
  }

  // Rows are tokens in walking order: row r of a chunk is token start + r, or start - r backwards.
  const int chunks = (p.length + kChunk - 1) / kChunk;
  const int sign = reverse ? -1 : 1;
  auto start_of = [&](int walk) { return reverse ? (chunks - walk) * kChunk - 1 : walk * kChunk; };

  // Copies a chunk's rows from `first_row` on, `row_step` apart. Tokens beyond the end become zeros.
  auto copy_rows = [&](auto bytes, Bits* to, int to_step, const Bits* from, int64_t token_stride, int start,
                       int first_row, int row_step) {
    int token = start + sign * first_row;
    from += token * token_stride;
    const int64_t from_step = sign * row_step * token_stride;
#pragma unroll 4
    for (int row = first_row; row < kChunk; row += row_step) {
      CopyAsync<decltype(bytes)::value>(to, from, token < p.length);
      to += to_step;
      from += from_step;
      token += sign * row_step;
    }
  };
  auto fetch = [&](int walk) {
    const int start = start_of(walk);
    const int piece = thread % kPieces * kPiece;
    constexpr int kBytes = kPiece * sizeof(IO);
    if (piece < channels_left) {
      const int first_row = thread / kPieces;
      const int row_step = threads / kPieces;
      const Bits* const u = static_cast<const Bits*>(direction.u) + batch * direction.u_batch + first_channel + piece;
      const Bits* const delta =
          static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch + first_channel + piece;
#pragma unroll 1
      for (int row = first_row; row < kChunk; row += row_step) {
        const int64_t token = start + sign * row;
        const int at = row / kTokens * Shared::kLaneElements + row % kTokens * kChannels + piece;
        CopyAsync<kBytes>(&shared.inputs[0][at], u + token * direction.u_token, token < p.length);
        CopyAsync<kBytes>(&shared.inputs[1][at], delta + token * direction.delta_token, token < p.length);
      }
    }
    const int scan_group = first_channel / p.channels_per_group;
    auto copy_states = [&](auto elements) {
      constexpr int kElements = decltype(elements)::value;
      constexpr int kPerRow = 2 * kStates / kElements;
      const int of_row = thread % kPerRow * kElements;
      const bool is_b = of_row < kStates;
      const Bits* const from = is_b ? static_cast<const Bits*>(direction.B) + batch * direction.B_batch +
                                          scan_group * direction.B_group + of_row
                                    : static_cast<const Bits*>(direction.C) + batch * direction.C_batch +
                                          scan_group * direction.C_group + of_row - kStates;
      const int first_row = thread / kPerRow, row_step = threads / kPerRow;
      copy_rows(std::integral_constant<int, kElements * sizeof(IO)>(),
                &shared.rows[first_row * Shared::kRowElements + of_row], row_step * Shared::kRowElements, from,
                is_b ? direction.B_token : direction.C_token, start, first_row, row_step);
    };
    if (p.state_granule == 16)
      copy_states(std::integral_constant<int, 16 / sizeof(IO)>());
    else
      copy_states(std::integral_constant<int, 4>());
  };

  auto fetch_late = [&](int walk, bool partner) {
    const int piece = thread % kPieces * kPiece;
    if (piece >= channels_left) return;
    const int start = start_of(walk);
    const int first_row = thread / kPieces, row_step = threads / kPieces;
    constexpr auto kBytes = std::integral_constant<int, kPiece * sizeof(IO)>();
    if (p.z)
      copy_rows(kBytes, &shared.late[0][first_row * kChannels + piece], row_step * kChannels,
                static_cast<const Bits*>(p.z) + batch * p.z_batch + first_channel + piece, p.z_token, start, first_row,
                row_step);
    if (partner)
      copy_rows(kBytes, &shared.late[1][first_row * kChannels + piece], row_step * kChannels,
                static_cast<const Bits*>(p.y) + batch * p.y_batch + first_channel + piece, p.y_token, start, first_row,
                row_step);
  };

  // Channels beyond the end are never fetched; what lies there must at least be finite.
  if (channels_left < kChannels) {
    for (int i = thread; i < 2 * kLanes * Shared::kLaneElements; i += threads) shared.inputs[0][i] = Bits{};
    __syncthreads();
  }
  fetch(0);

#pragma unroll 1
  for (int walk = 0; walk < chunks; ++walk) {
    CopyWait();
    __syncthreads();

    // B and C to fp32, transposed four tokens by four states.
    constexpr int kItems = kLanes * Shared::kQuads * 8;
#pragma unroll 1
    for (int item = thread; item < kItems; item += threads) {
      const int four = item / 8 % 8;
      const int quad_index = item / 64 * 8 + item % 8;
      const int to_lane = quad_index / Shared::kQuads, quad = quad_index % Shared::kQuads;
      float4 value[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int row = min(to_lane * kTokens + quad * 4 + t, kChunk - 1);
        value[t] = E::ToFloat4(
            *reinterpret_cast<const typename E::Bits4*>(&shared.rows[row * Shared::kRowElements + four * 4]));
      }
      StoreTransposed(shared.planes + four * 4 * Shared::kPlaneFloats + quad * Shared::kQuadFloats + to_lane * 4,
                      Shared::kPlaneFloats, value);
    }

    // This lane's tokens.
    float step[kTokens], gain[kTokens], y[kTokens];
    float total = 0.0f;
    {
      const int from = row_lane * Shared::kLaneElements + channel;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        gain[t] = E::ToFloat(shared.inputs[0][from + t * kChannels]);
        step[t] = E::ToFloat(shared.inputs[1][from + t * kChannels]) + bias;
      }
      if (p.delta_softplus) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) step[t] = Softplus<kFloat32>(step[t]);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        y[t] = skip * gain[t];
        gain[t] *= step[t];
        total += step[t];
      }
    }
    __syncthreads();
    // Write out: plainly; or, as the first of a pair to meet this chunk, without the gate; or finish the pair's sum.
    // In the middle chunk of an odd number both meet at once: forward counts as first.
    const bool middle = p.pair && walk == chunks / 2;
    const bool first = p.pair && (walk < chunks / 2 || (middle && chunks % 2 == 1 && !reverse));
    if (!first) fetch_late(walk, p.pair && !middle);
    if (walk + 1 < chunks) fetch(walk + 1);

    const int states = kStates / shape.split;
#pragma unroll 1
    for (int n = part * states; n < (part + 1) * states; n += kTogether) {
      float lane_decay[kTogether], state[kTogether], carry[kTogether];
      float a[kTogether][kTokens], x[kTogether][kTokens];
      const float2 A2 = *reinterpret_cast<const float2*>(&shared.decays[channel][n]);
      const float2 carry2 = *reinterpret_cast<const float2*>(&shared.carries[channel][n]);
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const float A = m ? A2.y : A2.x;
        carry[m] = m ? carry2.y : carry2.x;
        lane_decay[m] = Decay<kFloat32>(A * total);
        state[m] = row_lane == 0 ? carry[m] : 0.0f;
        const float* const b_plane = shared.planes + (n + m) * Shared::kPlaneFloats + row_lane * 4;
#pragma unroll
        for (int q = 0; q < Shared::kQuads; ++q) {
          const float4 b4 = *reinterpret_cast<const float4*>(b_plane + q * Shared::kQuadFloats);
          const float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (q * 4 + t < kTokens) {
              const int i = q * 4 + t;
              a[m][i] = Decay<kFloat32>(step[i] * A);
              x[m][i] = gain[i] * b[t];
              state[m] = fmaf(a[m][i], state[m], x[m][i]);
            }
          }
        }
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
#pragma unroll
        for (int m = 0; m < kTogether; ++m) ScanStep(lane_decay[m], state[m], offset * kRowsPerWarp);
      }
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const float end = state[m];
        float s = FromLaneBefore(end, carry[m], kRowsPerWarp);
        if (row_lane == kLanes - 1) shared.carries[channel][n + m] = end;
        const float* const c_plane = shared.planes + (kStates + n + m) * Shared::kPlaneFloats + row_lane * 4;
#pragma unroll
        for (int q = 0; q < Shared::kQuads; ++q) {
          const float4 c4 = *reinterpret_cast<const float4*>(c_plane + q * Shared::kQuadFloats);
          const float c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (q * 4 + t < kTokens) {
              s = fmaf(a[m][q * 4 + t], s, x[m][q * 4 + t]);
              y[q * 4 + t] = fmaf(c[t], s, y[q * 4 + t]);
            }
          }
        }
      }
    }

    constexpr int kPitch = Shared::kOutputPitch;
    {
      float* const to = outputs + part * kOutputFloats + row_lane * Shared::kOutputLane + channel;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) to[t * kPitch] = y[t];
    }
    CopyWait();
    __syncthreads();

    if (middle && !first) {
      if (shape.cluster)
        ClusterBarrier();
      else
        __syncthreads();
    }
    const int piece = thread % kPieces * kPiece;
    if (piece < channels_left) {
      using Bits2 = typename E::Bits2;
      struct alignas(kPiece * sizeof(IO)) Piece {
        Bits2 each[kPiece / 2];
      };
      int row = thread / kPieces;
      const int row_step = threads / kPieces;
      int token = start_of(walk) + sign * row;
      Bits* y = static_cast<Bits*>(p.y) + batch * p.y_batch + first_channel + piece + token * p.y_token;
      const int64_t y_step = sign * row_step * p.y_token;
#pragma unroll 1
      for (; row < kChunk; row += row_step, token += sign * row_step, y += y_step) {
        if (token >= p.length) continue;
        Piece other = {}, gate = {};
        if (!first) {
          const int at = row * kChannels + piece;
          if (p.z) gate = *reinterpret_cast<const Piece*>(&shared.late[0][at]);
          if (middle)
            other = *reinterpret_cast<const Piece*>(y);
          else if (p.pair)
            other = *reinterpret_cast<const Piece*>(&shared.late[1][at]);
        }
        const float* const from = outputs + row / kTokens * Shared::kOutputLane + row % kTokens * kPitch + piece;
        float value[kPiece];
#pragma unroll
        for (int e = 0; e < kPiece; ++e) value[e] = from[e];
#pragma unroll 1
        for (int s = 1; s < shape.split; ++s) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e) value[e] += from[s * kOutputFloats + e];
        }
        if (!first) {
#pragma unroll
          for (int e = 0; e < kPiece; e += 2) {
            const float2 rest = E::ToFloat2(other.each[e / 2]);
            value[e] += rest.x;
            value[e + 1] += rest.y;
          }
          if (p.z) {
#pragma unroll
            for (int e = 0; e < kPiece; e += 2) {
              const float2 g = E::ToFloat2(gate.each[e / 2]);
              value[e] *= Silu(g.x);
              value[e + 1] *= Silu(g.y);
            }
          }
          if (p.y_scale) {
#pragma unroll
            for (int e = 0; e < kPiece; ++e) value[e] *= p.y_scale[first_channel + piece + e];
          }
        }
        Piece result;
#pragma unroll
        for (int e = 0; e < kPiece; e += 2) result.each[e / 2] = E::FromFloat2(make_float2(value[e], value[e + 1]));
        *reinterpret_cast<Piece*>(y) = result;
      }
    }
    if (middle && first) {
      if (shape.cluster)
        ClusterBarrier();
      else
        __syncthreads();
    }
  }
}

template <typename IO, int kTokens, int kLanes, int kChannels>
cudaError_t LaunchLanesAs(const Params& params, const LaneShape& shape, cudaStream_t stream) {
  using Shared = LanesShared<IO, kTokens, kLanes, kChannels>;
  static_assert(Shared::Bytes(1) == LanesSizes::Bytes(kTokens, kLanes, kChannels, 1, sizeof(IO)), "one formula");
  static_assert(Shared::Bytes(2) == LanesSizes::Bytes(kTokens, kLanes, kChannels, 2, sizeof(IO)), "one formula");
  const int threads = shape.directions * shape.split * kChannels * kLanes;
  const size_t shared = shape.directions * Shared::Bytes(shape.split);
  const int64_t blocks =
      int64_t{(params.channels + kChannels - 1) / kChannels} * params.batch * (shape.cluster ? 2 : 1);
  if (threads > kLanesMaxThreads) return cudaErrorInvalidConfiguration;
  return LaunchKernel(LanesScan<IO, kTokens, kLanes, kChannels>,
                      shape.cluster ? Launch::kBlocksInPairs : Launch::kAlone, blocks, threads, shared, stream, params,
                      shape);
}

template <typename IO>
cudaError_t LaunchLanes(const Params& params, const vim_scan_variant& variant, cudaStream_t stream) {
  const LaneShape shape = {variant.split, params.pair && !variant.apart ? 2 : 1, variant.apart};
#define VIM_LANES(tokens_, lanes_, channels_)                                                \
  if (variant.tokens == tokens_ && variant.lanes == lanes_ && variant.channels == channels_) \
    return LaunchLanesAs<IO, tokens_, lanes_, channels_>(params, shape, stream);
  VIM_LANES_INSTANCES(VIM_LANES)
#undef VIM_LANES
  return cudaErrorInvalidValue;
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_LANES_CUH_
