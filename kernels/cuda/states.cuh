// Form (iii): a row's states lie across lanes, so that few rows keep many lanes busy and no row is ever scanned twice.
//
// A row is one channel of one direction. kLanes lanes walk its tokens side by side, each with 16 / kLanes of the states
// in registers: five instructions a state and token, the least there is, and a chain of one FMA a token. The lanes'
// parts of y are summed kLanes tokens at a time by a reduction that leaves each lane one token's sum (kLanes - 1
// shuffles). A lane may walk several rows at once (kRows), which share the B and C it reads.
//
// Everything that is not the recurrence is done by helper warps of the same block, a tile ahead or a tile behind: B and
// C to fp32 and transposed, Delta through its softplus, Delta u; then D u, the partner's part, the gate and the
// rounding. B and C may have warps of their own (kApart). Scanning warps and helpers meet at one barrier a tile.
// Helpers ask for what they need from global memory long before they use it: u, Delta, B and C a step ahead, the rest
// before they prepare.
//
//   step i:   scanning warps   tile i
//             helpers          ask for the late of i - 1;  prepare i + 1;  finish i - 1;  ask for the early of i + 2
//
// A pair is two directions in one block. They walk the same tiles from opposite ends: whoever meets a tile first leaves
// its part in y, the other adds, gates and finishes it.
//
// A long sequence of few rows leaves most of a card idle, and each block alone on its SM with its waits. Then it is cut
// into chunks, which are scanned side by side: carries.cuh works out what each makes of the states it begins with, and
// a block begins with what those before its own make of none (kResumes).
#ifndef VIM_KERNELS_CUDA_STATES_CUH_
#define VIM_KERNELS_CUDA_STATES_CUH_

#include <type_traits>

#include "cuda/carries.cuh"
#include "cuda/choose_variant.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/params.h"
#include "cuda/warp.cuh"

namespace vim::cuda {

// Some tokens of a sequence, and where their block leaves or finds what chunks carry over.
struct Chunk {
  int64_t batch;
  int first_token, length, tiles;
  int index, count;
  Carry* carries;  // of the batch's direction 0: [direction][chunk][channel][state]
};

// What a direction keeps in shared memory. What is there twice is scanned for one tile while the next is prepared and
// the last is finished. Rows are tokens in walking order.
template <int kChannels, int kTile>
struct alignas(16) StatesShared {
  static constexpr int kPitch = kTile + StatesSizes::kPad;
  static constexpr int kQuads = kChannels / 4, kQuadPitch = StatesSizes::QuadPitch(kChannels, kTile);
  float states[2][2 * kStates][kPitch];  // B, then C
  float step[2][kQuads][kQuadPitch];     // Delta, of four channels each
  float gain[2][kQuads][kQuadPitch];     // Delta u
  float out[2][kQuads][kQuadPitch];
  float skip[kChannels], bias[kChannels], scale[kChannels];  // D, Delta's bias, y's scale
};

// A value as it stands, which the compiler else computes anew from its origin at every use.
template <typename T>
__device__ __forceinline__ T Keep(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// A scanning lane's place in its warp, of rows by parts of a row's states.
//
// A load of 16 bytes takes a warp four turns, or two if in each half of the warp lanes i and i ^ 1 ask for the same, or
// lanes i and i ^ 2, and the half's other addresses are in other banks. Lanes i and i ^ 1 share a row, so Delta and
// Delta u take two; i and i ^ 2 share the states, so B and C do.
template <int kLanes>
struct LanePlace {
  static constexpr int kRows = 32 / kLanes;
  int row, part;
  __device__ __forceinline__ explicit LanePlace(int lane)
      : row(lane / 2 % kRows), part(lane % 2 + lane / (2 * kRows) * 2) {}
  // How far apart lanes are whose parts differ by `parts`, a power of two.
  static constexpr __device__ int Apart(int parts) { return parts == 1 ? 1 : parts * kRows; }
};

// The channel of a block that row `row` of scanning warp `warp` is. Where eight rows meet in half a warp, they are two
// quads half the block apart: those begin in banks apart.
template <int kLanes, int kChannels, int kRows>
__device__ __forceinline__ int ChannelOf(int warp, int row) {
  constexpr int kRowsPerWarp = 32 / kLanes;
  static_assert(kRows == 1 || kRowsPerWarp == 4, "the rows of a lane are a quad apart");
  if (kRowsPerWarp < 8) return warp * kRowsPerWarp * kRows + row;
  const int pair = warp * (kRowsPerWarp / 8) + row / 8;
  return (pair + row / 4 % 2 * (kChannels / 8)) * 4 + row % 4;
}

// The scanning warps' part. `thread` counts within the direction.
//
// A warp may be alone on its quarter of the SM, so what takes long is asked for ahead: four tokens are loaded and their
// decays computed while others are scanned, and a group's sums are gathered a round at a time during the next group.
// (A store to shared memory also keeps the compiler from moving later loads before it.)
template <typename IO, int kLanes, int kChannels, int kTile, int kRows, bool kResumes, typename Shared>
__device__ __forceinline__ void ScanTiles(const Direction& direction, bool reverse, int channels, Shared& shared,
                                          int thread, int first_channel, const Chunk& chunk, int middle) {
  const int tiles = chunk.tiles;
  constexpr int kOwn = kStates / kLanes;           // states a lane
  constexpr int kGroup = kLanes < 4 ? 4 : kLanes;  // tokens whose parts of y are held
  constexpr int kQuads = kGroup / 4;
  constexpr int kRounds = kLanes == 16 ? 4 : kLanes == 8 ? 3 : kLanes == 4 ? 2 : 1;
  constexpr int kRoundsPerQuad = (kRounds + kQuads - 1) / kQuads;
  constexpr bool kDeep = kOwn <= 2;  // else it would take too many registers, and there are more warps
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  constexpr int kHeld = kGroup / kLanes;  // tokens of a group that a lane has after all rounds
  static_assert(kTile % kGroup == 0 && (1 << kRounds) == kLanes);
  const LanePlace<kLanes> place(threadIdx.x & 31);
  const int part = place.part;
  const int first_row = ChannelOf<kLanes, kChannels, kRows>(thread / 32, place.row);  // then every fourth
  auto channel_of = [&](int r) { return int64_t{min(first_channel + first_row + 4 * r, channels - 1)}; };

  float A[kRows][kOwn], state[kRows][kOwn] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int m = 0; m < kOwn; ++m) A[r][m] = direction.A[channel_of(r) * kStates + part + m * kLanes] * kLog2e;
  if constexpr (kResumes) {
    WaitForLaunchBefore();
    const int64_t next = (reverse ? -1 : 1) * int64_t{channels} * kStates;
    const Carry* before = chunk.carries + (reverse ? chunk.count - 1 : 0) * int64_t{channels} * kStates + part;
    for (int i = reverse ? chunk.count - 1 - chunk.index : chunk.index; i > 0; --i, before += next) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          const Carry carry = before[channel_of(r) * kStates + m * kLanes];
          state[r][m] = fmaf(carry.decay, state[r][m], carry.state);
        }
      }
    }
  }

  struct Loaded {
    float4 step[kRows], gain[kRows], b[kOwn], c[kOwn];
  };
  struct Ready {
    float decay[kRows][kOwn][4], add[kRows][kOwn][4];
    float4 c[kOwn];
  };
  auto transform = [&](const Loaded& from) {
    Ready to;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int m = 0; m < kOwn; ++m) to.decay[r][m][t] = Decay<kFloat32>(At(from.step[r], t) * A[r][m]);
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int t = 0; t < 4; ++t) to.add[r][m][t] = At(from.gain[r], t) * At(from.b[m], t);
      to.c[m] = from.c[m];
    }
    return to;
  };

  __syncthreads();
  __syncthreads();
#pragma unroll 1
  for (int walk = 0; walk <= tiles; ++walk) {
    if (walk < tiles) {
      const int buffer = walk & 1;
      const int row = first_row % 4 * shared.kPitch;
      const float* const steps = shared.step[buffer][first_row / 4] + row;
      const float* const gains = shared.gain[buffer][first_row / 4] + row;
      float* const out = shared.out[buffer][first_row / 4] + row + part * kHeld;
      const float* const states = shared.states[buffer][part];
      auto load = [&](int from) {
        Loaded to;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          to.step[r] = *reinterpret_cast<const float4*>(steps + r * shared.kQuadPitch + from);
          to.gain[r] = *reinterpret_cast<const float4*>(gains + r * shared.kQuadPitch + from);
        }
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          to.b[m] = *reinterpret_cast<const float4*>(states + m * kLanes * shared.kPitch + from);
          to.c[m] = *reinterpret_cast<const float4*>(states + (kStates + m * kLanes) * shared.kPitch + from);
        }
        return to;
      };
      float y[kRows][kGroup], held[kRows][kGroup];
      auto round = [&](int step) {
        const int parts = kLanes >> (step + 1);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          HalveSum<kGroup / 2>(held[r], kGroup >> (step + 1), place.Apart(parts), part & parts);
      };
      auto scan = [&](const Ready& now, float (*sums)[kGroup], int first) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              float& sum = sums[r][first + t];
              state[r][m] = fmaf(now.decay[r][m][t], state[r][m], now.add[r][m][t]);
              sum = m == 0 ? At(now.c[m], t) * state[r][m] : fmaf(At(now.c[m], t), state[r][m], sum);
            }
          }
        }
      };
      auto store = [&](int group) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float* const to = out + r * shared.kQuadPitch + group;
          if constexpr (kHeld == 2)
            *reinterpret_cast<float2*>(to) = make_float2(held[r][0], held[r][1]);
          else
            *to = held[r][0];
        }
      };
      auto gather = [&](int group) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) round(r);
        store(group);
      };
      auto keep = [&] {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < kGroup; ++i) held[r][i] = y[r][i];
      };

      if constexpr (kDeep) {
        Ready ready = transform(load(0));
        Loaded loaded = load(4);
#pragma unroll
        for (int from = 0; from < kTile; from += 4) {
          const Ready now = ready;
          if (from + 4 < kTile) ready = transform(loaded);
          if (from + 8 < kTile) loaded = load(from + 8);
          if (from >= kGroup) {
            const int first = from % kGroup / 4 * kRoundsPerQuad;
#pragma unroll
            for (int r = 0; r < kRoundsPerQuad; ++r)
              if (first + r < kRounds) round(first + r);
            if (first < kRounds && first + kRoundsPerQuad >= kRounds) store(from / kGroup * kGroup - kGroup);
          }
          scan(now, y, from % kGroup);
          if (from % kGroup == kGroup - 4) keep();
        }
        gather(kTile - kGroup);
      } else {
#pragma unroll
        for (int from = 0; from < kTile; from += 4) {
          const Ready now = transform(load(from));
          if (from > 0) gather(from - 4);
          scan(now, y, 0);
          keep();
        }
        gather(kTile - 4);
      }
    }
    if (walk == middle + 1) __syncthreads();
    __syncthreads();
  }
}

// Of a direction. Classes, where nvcc computes host constants that a kernel may then use.
template <int kLanes, int kChannels, int kRows>
struct StatesScanners {
  static constexpr int kThreads = StatesSizes::Scanning(kLanes, kChannels, kRows);
  static_assert(kThreads % 32 == 0, "whole warps");
};
template <int kChannels, int kTile, int kItems, bool kApart>
struct StatesHelpers {
  static constexpr int kThreads = StatesSizes::Helping(kChannels, kTile, kItems);
  static constexpr int kStateThreads = StatesSizes::StateHelping(kChannels, kTile, kItems, kApart);
  static constexpr int kStateItems = StatesSizes::StateItems(kChannels, kTile, kItems, kApart);
  static_assert(kThreads % 32 == 0, "whole warps");
};

// What a helper has a part in: rows of u, Delta, z and y, or B and C, or both.
enum class Help { kAll, kRows, kStates };

// The helpers' part: kItems times four channels of a token, and kStateItems times four states of four tokens, a thread.
// `thread` counts within the direction's helpers of this kind.
template <typename IO, int kChannels, int kTile, int kItems, Help kHelp>
__device__ __forceinline__ void PrepareAndFinish(const Params& p, const Direction& direction, bool reverse,
                                                 StatesShared<kChannels, kTile>& shared, int thread, int first_channel,
                                                 const Chunk& chunk, int middle) {
  const int tiles = chunk.tiles;
  const int64_t batch = chunk.batch;
  using E = Element<IO>;
  using Bits = typename E::Bits;
  using Bits4 = typename E::Bits4;
  constexpr int kPieces = kChannels / 4;
  constexpr bool kHasRows = kHelp != Help::kStates, kHasStates = kHelp != Help::kRows, kApart = kHelp != Help::kAll;
  using Helpers = StatesHelpers<kChannels, kTile, kItems, kApart>;
  constexpr int kThreads = Helpers::kThreads;
  constexpr int kStateThreads = Helpers::kStateThreads, kStateItems = Helpers::kStateItems;
  constexpr int kRowStep = kThreads / kPieces;
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  static_assert(kTile * kPieces % kItems == 0 && kThreads % 32 == 0 && kTile % 32 == 0);
  static_assert(kThreads % kPieces == 0, "a thread keeps its channels");

  const int piece = thread % kPieces * 4;
  const int channel = first_channel + piece;
  const bool inside = channel < p.channels;
  const int first_row = thread / kPieces;
  for (int c = thread; kHasRows && c < kChannels; c += kThreads) {
    const bool exists = first_channel + c < p.channels;
    shared.skip[c] = exists && direction.D ? direction.D[first_channel + c] : 0.0f;
    shared.bias[c] = exists && direction.delta_bias ? direction.delta_bias[first_channel + c] : 0.0f;
    shared.scale[c] = exists && p.y_scale ? p.y_scale[first_channel + c] : 1.0f;
  }

  // Row r of tile w is token w kTile + r, or (tiles - w) kTile - 1 - r backwards. One tile may be ragged, the last one
  // walked or, backwards, the first: its rows without a token are not stored, and hold zeros where the walk begins with
  // them, so that the states stay zero; where it ends with them, what the tile before left. A bit of `own_rows` for
  // each of this thread's rows of u, of `own_states` for each of its tokens of B and C; all are set but in the ragged
  // tile.
  const int tail = chunk.length - (tiles - 1) * kTile;
  const int ragged = Keep(tail == kTile ? -1 : reverse ? 0 : tiles - 1);
  auto four_of = [&](int j) { return (thread + j * kStateThreads) / 4 % 8; };
  auto states_row = [&](int j) { return ((thread + j * kStateThreads) / 32 * 4 + thread % 4) * 4; };
  auto has_states = [&](int j) {
    return kHasStates && ((j + 1) * kStateThreads <= 2 * kTile || thread + j * kStateThreads < 2 * kTile);
  };
  auto in_ragged = [&](int row) { return reverse ? row >= kTile - tail : row < tail; };
  uint32_t own_rows = 0, own_states = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) own_rows |= uint32_t{in_ragged(first_row + j * kRowStep)} << j;
#pragma unroll
  for (int j = 0; j < kStateItems; ++j)
#pragma unroll
    for (int t = 0; t < 4; ++t) own_states |= uint32_t{in_ragged(states_row(j) + t)} << (4 * j + t);
  const uint32_t all_rows = Keep(inside ? ~0u : 0);
  own_rows = Keep(own_rows & all_rows);
  own_states = Keep(own_states);

  // The tiles this direction is the first of its pair to meet, forward being the first where both do at once.
  const int first_tiles = Keep(p.pair ? tiles / 2 + (middle >= 0 && !reverse) : 0);
  // Each pointer stands at this thread's first row of the tile to load or to finish next, and moves on by a tile. z
  // waits at the first tile that is gated.
  const int sign = reverse ? -1 : 1;
  const int first_token = chunk.first_token + (reverse ? tiles * kTile - 1 : 0);
  const int own_token = first_token + sign * first_row;
  const Bits* u =
      static_cast<const Bits*>(direction.u) + batch * direction.u_batch + channel + own_token * direction.u_token;
  const Bits* delta = static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch + channel +
                      own_token * direction.delta_token;
  const Bits* z = static_cast<const Bits*>(p.z);
  if (p.z) z += batch * p.z_batch + channel + (own_token + sign * first_tiles * kTile) * p.z_token;
  Bits* y = static_cast<Bits*>(p.y) + batch * p.y_batch + channel + own_token * p.y_token;
  // 32 bits are enough, or CanRun would not let this form run.
  const int u_row = Keep(static_cast<int>(sign * kRowStep * direction.u_token));
  const int delta_row = Keep(static_cast<int>(sign * kRowStep * direction.delta_token));
  const int z_row = Keep(static_cast<int>(p.z ? sign * kRowStep * p.z_token : 0));
  const int y_row = Keep(static_cast<int>(sign * kRowStep * p.y_token));

  // Of B and C, four states of four tokens an item: states 4 four ..., tokens from `states_row` on.
  const int scan_group = first_channel / p.channels_per_group;
  const Bits* states[kStateItems];
  int states_token[kStateItems];
#pragma unroll
  for (int j = 0; j < kStateItems; ++j) {
    const int four = four_of(j);
    states_token[j] = Keep(static_cast<int>(sign * (four < 4 ? direction.B_token : direction.C_token)));
    states[j] = (four < 4 ? static_cast<const Bits*>(direction.B) + batch * direction.B_batch +
                                scan_group * direction.B_group + four * 4
                          : static_cast<const Bits*>(direction.C) + batch * direction.C_batch +
                                scan_group * direction.C_group + (four - 4) * 4) +
                int64_t{sign * first_token + states_row(j)} * states_token[j];
  }

  // Of the tile to be prepared in the next step.
  Bits4 early_u[kItems] = {}, early_delta[kItems] = {}, early_states[kStateItems][4] = {};
  auto load_early = [&](int walk) {
    const bool exists = walk < tiles;
    const uint32_t rows = !exists ? 0 : walk == ragged ? own_rows : all_rows;
    const uint32_t tokens = !exists ? 0 : walk == ragged ? own_states : ~0u;
#pragma unroll
    for (int j = 0; kHasRows && j < kItems; ++j) {
      if (rows >> j & 1) {
        early_u[j] = *reinterpret_cast<const Bits4*>(u);
        early_delta[j] = *reinterpret_cast<const Bits4*>(delta);
      }
      u += u_row;
      delta += delta_row;
    }
#pragma unroll
    for (int j = 0; j < kStateItems; ++j) {
      if (!has_states(j)) continue;
      const Bits* from = states[j];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (tokens >> (4 * j + t) & 1) early_states[j][t] = *reinterpret_cast<const Bits4*>(from);
        from += states_token[j];
      }
      states[j] += kTile * states_token[j];
    }
  };

  auto prepare = [&](int walk) {
    const int buffer = walk & 1;
#pragma unroll
    for (int j = 0; j < kStateItems; ++j) {
      if (!has_states(j)) continue;
      float4 value[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) value[t] = E::ToFloat4(early_states[j][t]);
      StoreTransposed(&shared.states[buffer][four_of(j) * 4][states_row(j)], shared.kPitch, value);
    }
    if (!kHasRows) return;
    const float4 bias = *reinterpret_cast<const float4*>(&shared.bias[piece]);
    float step[kItems][4];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const float4 delta4 = E::ToFloat4(early_delta[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) step[j][e] = At(delta4, e) + At(bias, e);
    }
    if (p.delta_softplus) SoftplusEach<kFloat32, 4 * kItems>(&step[0][0]);
    float* const steps = &shared.step[buffer][piece / 4][first_row];
    float* const gains = &shared.gain[buffer][piece / 4][first_row];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const float4 u4 = E::ToFloat4(early_u[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        steps[e * shared.kPitch + j * kRowStep] = step[j][e];
        gains[e * shared.kPitch + j * kRowStep] = step[j][e] * At(u4, e);
      }
    }
  };

  // Of the tile to finish: u again, z, and what the partner left in y.
  Bits4 finish_u[kItems] = {}, gate[kItems] = {}, other[kItems] = {};
  auto load_late = [&](bool gates, uint32_t rows) {
    const Bits* const late_u = u - 3 * kItems * u_row;  // three tiles before the next to load
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (rows >> j & 1) {
        finish_u[j] = *reinterpret_cast<const Bits4*>(late_u + j * u_row);
        if (gates) gate[j] = *reinterpret_cast<const Bits4*>(z + j * z_row);
      }
    }
    if (gates) z += kItems * z_row;
  };
  auto load_other = [&](uint32_t rows) {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (rows >> j & 1) other[j] = *reinterpret_cast<const Bits4*>(y + j * y_row);
  };
  auto finish = [&](int walk, uint32_t rows) {
    const float4 skip = *reinterpret_cast<const float4*>(&shared.skip[piece]);
    const float* const sums = &shared.out[walk & 1][piece / 4][first_row];
    float value[kItems][4];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const float4 u4 = E::ToFloat4(finish_u[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) value[j][e] = fmaf(At(skip, e), At(u4, e), sums[e * shared.kPitch + j * kRowStep]);
    }
    if (walk >= first_tiles) {
      if (p.pair) {
        const float4 scale = *reinterpret_cast<const float4*>(&shared.scale[piece]);
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          const float4 other4 = E::ToFloat4(other[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) value[j][e] = (value[j][e] + At(other4, e)) * At(scale, e);
        }
      }
      if (p.z) {
        float through[kItems][4];
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          const float4 gate4 = E::ToFloat4(gate[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) through[j][e] = At(gate4, e);
        }
        SiluEach<4 * kItems>(&through[0][0]);
#pragma unroll
        for (int j = 0; j < kItems; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) value[j][e] *= through[j][e];
      }
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (rows >> j & 1)
        *reinterpret_cast<Bits4*>(y) = E::FromFloat4(make_float4(value[j][0], value[j][1], value[j][2], value[j][3]));
      y += y_row;
    }
  };

  load_early(0);
  __syncthreads();
  prepare(0);
  load_early(1);
  __syncthreads();
#pragma unroll 1
  for (int walk = 0; walk <= tiles; ++walk) {
    const int done = walk - 1;
    const uint32_t rows = done == ragged ? own_rows : all_rows;
    const bool meets = done == middle;
    if (!kHasRows) {
      if (walk + 1 < tiles) prepare(walk + 1);
      if (meets) __syncthreads();
      load_early(walk + 2);
      __syncthreads();
      continue;
    }
    if (done >= 0) {
      load_late(p.z && done >= first_tiles, rows);
      if (p.pair && done >= first_tiles && !meets) load_other(rows);
    }
    if (walk + 1 < tiles) prepare(walk + 1);
    if (done >= 0) {
      if (meets && reverse) {  // both meet this tile: reverse waits for what forward writes
        __syncthreads();
        load_other(rows);
      }
      finish(done, rows);
      if (meets && !reverse) __syncthreads();
    }
    load_early(walk + 2);
    __syncthreads();
  }
}

template <typename IO, int kLanes, int kChannels, int kTile, int kItems, int kRows, int kApart, int kBlocks,
          bool kResumes>
__global__ void __launch_bounds__(StatesSizes::Threads(kLanes, kChannels, kTile, kItems, kRows, kApart, 2), kBlocks)
    StatesScan(const __grid_constant__ Params p) {
  using Shared = StatesShared<kChannels, kTile>;
  constexpr int kScanning = StatesScanners<kLanes, kChannels, kRows>::kThreads;
  constexpr int kHelping = StatesHelpers<kChannels, kTile, kItems, kApart != 0>::kThreads;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared* const shared = reinterpret_cast<Shared*>(shared_memory);

  const int channel_blocks = (p.channels + kChannels - 1) / kChannels;
  const int first_channel = blockIdx.x % channel_blocks * kChannels;
  Chunk chunk = {blockIdx.x / channel_blocks, 0, p.length, 0, 0, 1, nullptr};
  if (kResumes) {
    chunk.count = p.chunks;
    chunk.index = static_cast<int>(chunk.batch % p.chunks);
    chunk.batch /= p.chunks;
    chunk.first_token = chunk.index * p.chunk_tokens;
    chunk.length = min(p.length - chunk.first_token, p.chunk_tokens);
    chunk.carries = static_cast<Carry*>(p.workspace) + chunk.batch * (1 + p.pair) * p.chunks * p.channels * kStates;
  }
  chunk.tiles = (chunk.length + kTile - 1) / kTile;
  // The tile both directions come to at the same step, or none.
  const int middle = Keep(p.pair && chunk.tiles % 2 == 1 ? chunk.tiles / 2 : -2);

  const int scanning = kScanning << p.pair;
  const int thread = threadIdx.x;
  if (thread < scanning) {
    const int side = Keep(static_cast<int>(thread >= kScanning));
    const bool reverse = (p.pair ? side : p.reverse) != 0;
    const int own = Keep(thread - side * kScanning);
    if (kResumes) chunk.carries += int64_t{side} * p.chunks * p.channels * kStates;
    ScanTiles<IO, kLanes, kChannels, kTile, kRows, kResumes>(p.direction[side], reverse, p.channels, shared[side],
                                                             Keep(thread - side * kScanning), first_channel, chunk,
                                                             middle);
  } else if (const int helpers = kHelping << p.pair; !kApart || thread < scanning + helpers) {
    const int side = Keep(static_cast<int>(thread - scanning >= kHelping));
    const bool reverse = Keep(p.pair ? side : p.reverse) != 0;
    PrepareAndFinish<IO, kChannels, kTile, kItems, kApart ? Help::kRows : Help::kAll>(
        p, p.direction[side], reverse, shared[side], Keep(thread - scanning - side * kHelping), first_channel, chunk,
        middle);
  } else {
    const int own = thread - scanning - helpers;
    const int side = Keep(static_cast<int>(own >= kTile));
    const bool reverse = Keep(p.pair ? side : p.reverse) != 0;
    PrepareAndFinish<IO, kChannels, kTile, kItems, Help::kStates>(
        p, p.direction[side], reverse, shared[side], Keep(own - side * kTile), first_channel, chunk, middle);
  }
}

template <typename IO, int kLanes, int kChannels, int kTile, int kItems, int kRows, int kApart, int kBlocks,
          bool kResumes>
cudaError_t LaunchStatesAs(const Params& params, int sm, cudaStream_t stream) {
  const int directions = params.pair ? 2 : 1;
  constexpr size_t kBytes = StatesSizes::Bytes(kChannels, kTile);
  static_assert(sizeof(StatesShared<kChannels, kTile>) == kBytes, "one formula");
  const size_t shared = directions * kBytes;
  const int64_t blocks =
      int64_t{(params.channels + kChannels - 1) / kChannels} * params.batch * (kResumes ? params.chunks : 1);
  const int threads = StatesSizes::Threads(kLanes, kChannels, kTile, kItems, kRows, kApart, directions);
  return LaunchKernel(StatesScan<IO, kLanes, kChannels, kTile, kItems, kRows, kApart, kBlocks, kResumes>,
                      kResumes && sm >= 90 ? Launch::kBesideTheBefore : Launch::kAlone, blocks, threads, shared, stream,
                      params);
}

// `sm` is the device's compute capability, as Choose has it.
template <typename IO>
cudaError_t LaunchStates(const Params& given, const vim_scan_variant& variant, int sm, cudaStream_t stream) {
  Params params = given;
  auto is = [&](int lanes, int channels, int tile, int items, int rows, int apart) {
    return variant.lanes == lanes && variant.channels == channels && variant.tokens == tile && variant.split == items &&
           variant.rows == rows && variant.apart == apart;
  };
  const int tiles = (params.length + variant.tokens - 1) / variant.tokens;
  const int chunk_tiles = variant.chunks > 1 ? (tiles + variant.chunks - 1) / variant.chunks : tiles;
  params.chunk_tokens = chunk_tiles * variant.tokens;
  params.chunks = (tiles + chunk_tiles - 1) / chunk_tiles;  // none is empty
  if (variant.chunks > 1 && params.chunks > 1) {
    const cudaError_t error = LaunchCarries<IO>(params, stream);
    if (error != cudaSuccess) return error;
#define VIM_STATES(lanes_, channels_, tile_, items_, rows_, apart_, blocks_) \
  if (is(lanes_, channels_, tile_, items_, rows_, apart_))                   \
    return LaunchStatesAs<IO, lanes_, channels_, tile_, items_, rows_, apart_, blocks_, true>(params, sm, stream);
    VIM_STATES_CHUNKED(VIM_STATES)
#undef VIM_STATES
    return cudaErrorInvalidValue;
  }
#define VIM_STATES(lanes_, channels_, tile_, items_, rows_, apart_, blocks_) \
  if (is(lanes_, channels_, tile_, items_, rows_, apart_))                   \
    return LaunchStatesAs<IO, lanes_, channels_, tile_, items_, rows_, apart_, blocks_, false>(params, sm, stream);
  VIM_STATES_INSTANCES(VIM_STATES)
#undef VIM_STATES
  return cudaErrorInvalidValue;
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_STATES_CUH_
