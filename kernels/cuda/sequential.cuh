// Form (i): a thread walks the tokens of one or two channels with all 16 states in registers.
//
// A block is 64 threads a direction. For a pair, the forward half walks tokens up and the reverse half walks them down
// at the same time; each leaves its part in y for the tokens it meets first, and after one barrier half way adds,
// gates and finishes the tokens the other met first. So the sum costs no second kernel, no workspace and one barrier.
//
// Tokens are taken in tiles of 8, whose u, delta and z lie in shared memory as they came, and B and C as fp32
// (converted once a block, not once a thread). The next tile is fetched while one is walked. A last, ragged tile is
// filled with zeros: u = 0 adds nothing to the state, and what the padding does to it is before the first token or
// after the last. Rows must be aligned (CanRunSequential).
#ifndef VIM_KERNELS_CUDA_SEQUENTIAL_CUH_
#define VIM_KERNELS_CUDA_SEQUENTIAL_CUH_

#include <type_traits>

#include "cuda/copy.cuh"
#include "cuda/math.cuh"
#include "cuda/params.h"

namespace vim::cuda {

constexpr int kSequentialThreads = 64;  // per direction
constexpr int kTile = 8;                // tokens a block holds
// Blocks an SM holds. With fewer registers the compiler puts each exponential right before its use, and the form is a
// third slower; Vim's batches of 64 and 128 fill 132 SMs with 2.9 blocks or a multiple of it.
constexpr int kSequentialBlocks = 3;

template <typename IO, int kChannels>
struct Pack {  // kChannels adjacent channels of one token
  using E = Element<IO>;
  using Bits = std::conditional_t<kChannels == 1, typename E::Bits, typename E::Bits2>;
  static __device__ __forceinline__ void Unpack(Bits bits, float (&x)[kChannels]) {
    if constexpr (kChannels == 1) {
      x[0] = E::ToFloat(bits);
    } else {
      const float2 pair = E::ToFloat2(bits);
      x[0] = pair.x;
      x[1] = pair.y;
    }
  }
  static __device__ __forceinline__ Bits From(const float (&x)[kChannels]) {
    if constexpr (kChannels == 1) {
      return E::FromFloat(x[0]);
    } else {
      return E::FromFloat2(make_float2(x[0], x[1]));
    }
  }
};

template <typename IO, int kChannels>
struct alignas(16) SequentialShared {
  float rows[2][kTile][2 * kStates];  // [buffer][token in walking order][B, C]
  typename Element<IO>::Bits inputs[2][3][kTile][kSequentialThreads * kChannels];  // [buffer][u, delta, z]
};

template <typename IO, int kChannels>
__global__ void __launch_bounds__(2 * kSequentialThreads, kSequentialBlocks)
    SequentialScan(const __grid_constant__ Params p) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  using P = Pack<IO, kChannels>;
  using PackBits = typename P::Bits;
  __shared__ SequentialShared<IO, kChannels> shared[2];

  const int side = threadIdx.x / kSequentialThreads;
  const int thread = threadIdx.x % kSequentialThreads;
  const Direction& direction = p.direction[side];
  SequentialShared<IO, kChannels>& own_shared = shared[side];
  const bool reverse = p.pair ? side == 1 : p.reverse != 0;
  const int tiles = (p.length + kTile - 1) / kTile;
  // The pair meets at a tile boundary near the middle: `own` tiles are walked before the barrier.
  const int middle = (p.length / 2 + kTile / 2) / kTile;
  const int own = p.pair ? (reverse ? tiles - middle : middle) : 0;

  constexpr int kGroup = 4;  // tokens in one unrolled step
  constexpr int kBlockChannels = kSequentialThreads * kChannels;
  const int channel_blocks = (p.channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t batch = blockIdx.x / channel_blocks;
  const int first_channel = blockIdx.x % channel_blocks * kBlockChannels;
  const int channel = first_channel + thread * kChannels;
  const bool writes = channel < p.channels;

  float A[kChannels][kStates], state[kChannels][kStates], skip[kChannels], bias[kChannels], scale[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int d = writes ? channel + c : 0;
    skip[c] = direction.D ? direction.D[d] : 0.0f;
    bias[c] = direction.delta_bias ? direction.delta_bias[d] : 0.0f;
    scale[c] = p.y_scale ? p.y_scale[d] : 1.0f;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      A[c][n] = direction.A[int64_t{d} * kStates + n] * kLog2e;
      state[c][n] = 0.0f;
    }
  }

  // This thread's share of a tile's fetch: an eighth of one token's B and C, and of its u, delta and z. `token` and the
  // pointers are those of the tile to fetch next; past the end they are not followed.
  constexpr int kShare = kBlockChannels / 8;
  const int row = thread / 8, eighth = thread % 8;
  int token = reverse ? tiles * kTile - 1 - row : row;
  const int tile_step = reverse ? -kTile : kTile;
  const Bits *u, *delta, *z = nullptr, *states;
  int64_t states_step;
  const int64_t u_step = tile_step * direction.u_token, delta_step = tile_step * direction.delta_token;
  const int64_t z_step = tile_step * p.z_token;
  {
    const int scan_group = first_channel / p.channels_per_group;
    const int64_t c = first_channel + eighth * kShare;
    u = static_cast<const Bits*>(direction.u) + batch * direction.u_batch + token * direction.u_token + c;
    delta =
        static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch + token * direction.delta_token + c;
    if (p.z) z = static_cast<const Bits*>(p.z) + batch * p.z_batch + token * p.z_token + c;
    if (eighth < 4) {
      states = static_cast<const Bits*>(direction.B) + batch * direction.B_batch + token * direction.B_token +
               scan_group * direction.B_group + eighth * 4;
      states_step = tile_step * direction.B_token;
    } else {
      states = static_cast<const Bits*>(direction.C) + batch * direction.C_batch + token * direction.C_token +
               scan_group * direction.C_group + (eighth - 4) * 4;
      states_step = tile_step * direction.C_token;
    }
  }
  const int channels_left = p.channels - first_channel - eighth * kShare;
  auto fetch = [&](Bits* to, const Bits* from, bool row_inside) {
    constexpr int kPiece = 16 / sizeof(Bits);
#pragma unroll
    for (int i = 0; i < kShare; i += kPiece) {
      const bool valid = row_inside && i < channels_left;
      CopyAsync<16>(to + i, valid ? from + i : direction.u, valid);
    }
  };
  auto fetch_tile = [&](int walk) {
    Bits* const to = &own_shared.inputs[walk & 1][0][row][eighth * kShare];
    constexpr int kNext = kTile * kBlockChannels;
    const bool row_inside = token < p.length;
    fetch(to, u, row_inside);
    fetch(to + kNext, delta, row_inside);
    if (p.z && walk >= own) fetch(to + 2 * kNext, z, row_inside);
    typename E::Bits4 bits = {};  // zero, not garbage, beyond the end: 0 times NaN would be NaN
    if (row_inside) bits = *reinterpret_cast<const typename E::Bits4*>(states);
    u += u_step;
    delta += delta_step;
    z += z_step;
    states += states_step;
    token += tile_step;
    return bits;
  };
  auto store_states = [&](int walk, typename E::Bits4 bits) {
    *reinterpret_cast<float4*>(&own_shared.rows[walk & 1][row][eighth * 4]) = E::ToFloat4(bits);
  };
  auto direction_barrier = [&] {
    if (side)
      asm volatile("bar.sync 2, %0;" ::"n"(kSequentialThreads) : "memory");
    else
      asm volatile("bar.sync 1, %0;" ::"n"(kSequentialThreads) : "memory");
  };

  store_states(0, fetch_tile(0));
  const int64_t y_step = reverse ? -p.y_token : p.y_token;
  int first_token = reverse ? tiles * kTile - 1 : 0;
  Bits* y = static_cast<Bits*>(p.y) + batch * p.y_batch + channel + first_token * p.y_token;

#pragma unroll 1
  for (int walk = 0; walk <= tiles; ++walk) {
    if (p.pair && walk == own) __syncthreads();
    if (walk == tiles) break;
    CopyWait();
    direction_barrier();
    const bool finish = walk >= own;
    typename E::Bits4 states_next = {};
    if (walk + 1 < tiles) states_next = fetch_tile(walk + 1);

#pragma unroll 1
    for (int half = 0; half < kTile / kGroup; ++half) {
      const float* const group_rows = own_shared.rows[walk & 1][half * kGroup];
      const auto* const inputs = &own_shared.inputs[walk & 1][0][half * kGroup];
      auto input = [&](int which, int q) {
        return *reinterpret_cast<const PackBits*>(&inputs[which * kTile + q][thread * kChannels]);
      };

      // Tokens of this group inside the sequence: a prefix of the walk forwards, a suffix of it backwards.
      const int inside_from = reverse ? first_token - (p.length - 1) : 0;
      const int inside_to = reverse ? kGroup : p.length - first_token;
      auto for_each_inside = [&](auto body) {
        if (!writes) return;
        if (inside_from <= 0 && inside_to >= kGroup) {
#pragma unroll
          for (int q = 0; q < kGroup; ++q) body(q, reinterpret_cast<PackBits*>(y + q * y_step));
        } else {
#pragma unroll
          for (int q = 0; q < kGroup; ++q)
            if (q >= inside_from && q < inside_to) body(q, reinterpret_cast<PackBits*>(y + q * y_step));
        }
      };
      PackBits partner[kGroup] = {};
      if (p.pair && finish) for_each_inside([&](int q, const PackBits* from) { partner[q] = *from; });

      float step[kGroup][kChannels], gain[kGroup][kChannels], out[kGroup][kChannels];
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        P::Unpack(input(0, q), gain[q]);
        P::Unpack(input(1, q), step[q]);
      }
      // One branch for the group: a branch a token would keep the compiler from overlapping tokens.
      if (p.delta_softplus) {
#pragma unroll
        for (int q = 0; q < kGroup; ++q)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) step[q][c] = Softplus<std::is_same_v<IO, float>>(step[q][c] + bias[c]);
      } else {
#pragma unroll
        for (int q = 0; q < kGroup; ++q)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) step[q][c] += bias[c];
      }
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        float sum[kChannels][2];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sum[c][0] = skip[c] * gain[q][c];
          sum[c][1] = 0.0f;
          gain[q][c] *= step[q][c];
        }
#pragma unroll
        for (int n = 0; n < kStates; n += 4) {
          const float4 b4 = *reinterpret_cast<const float4*>(group_rows + q * 2 * kStates + n);
          const float4 c4 = *reinterpret_cast<const float4*>(group_rows + q * 2 * kStates + kStates + n);
          const float b[4] = {b4.x, b4.y, b4.z, b4.w}, cc[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              const float decay = Decay<std::is_same_v<IO, float>>(step[q][c] * A[c][n + m]);
              state[c][n + m] = fmaf(decay, state[c][n + m], gain[q][c] * b[m]);
              sum[c][m & 1] = fmaf(cc[m], state[c][n + m], sum[c][m & 1]);
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kChannels; ++c) out[q][c] = sum[c][0] + sum[c][1];
      }

      if (finish) {
        if (p.pair) {
#pragma unroll
          for (int q = 0; q < kGroup; ++q) {
            float other[kChannels];
            P::Unpack(partner[q], other);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) out[q][c] += other[c];
          }
        }
        if (p.z) {
#pragma unroll
          for (int q = 0; q < kGroup; ++q) {
            float gate[kChannels];
            P::Unpack(input(2, q), gate);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) out[q][c] *= Silu(gate[c]);
          }
        }
#pragma unroll
        for (int q = 0; q < kGroup; ++q)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) out[q][c] *= scale[c];
      }
      for_each_inside([&](int q, PackBits* to) { *to = P::From(out[q]); });
      first_token += reverse ? -kGroup : kGroup;
      y += kGroup * y_step;
    }
    store_states(walk + 1, states_next);
  }
}

template <typename IO>
cudaError_t LaunchSequential(const Params& params, int channels_per_thread, cudaStream_t stream) {
  const int per_block = kSequentialThreads * channels_per_thread;
  const int64_t blocks = int64_t{(params.channels + per_block - 1) / per_block} * params.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int threads = params.pair ? 2 * kSequentialThreads : kSequentialThreads;
  if (channels_per_thread == 1) {
    SequentialScan<IO, 1><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(params);
  } else if constexpr (sizeof(IO) == 2) {  // two fp32 channels a thread would need more than 48 KiB of shared memory
    SequentialScan<IO, 2><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(params);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_SEQUENTIAL_CUH_
