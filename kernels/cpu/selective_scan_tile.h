// The selective scan on a CPU: channels across lanes, tokens in order.
//
// A task is one batch entry times a few neighbouring tiles of kLanes channels of one group. It keeps their states,
// tiles x states x kLanes floats, in the first-level cache and walks the tokens a chunk at a time; for each chunk it
//   loads  B and C, to fp32; then for each tile
//   loads  u and delta, to fp32; softplus
//   scans  for each token, for each state: s = exp2(Delta A') s + (Delta u) B, y += C s    with A' = A log2(e);
//          meanwhile the rows of the next chunk are fetched
//   stores y, gated by z, in the io type
// Both directions of a pair are two such walks of one task: the forward one leaves its part in y, where the reverse one
// finds it in the second-level cache.
// Nothing is shared between tasks and no sum runs across lanes, so the result depends neither on the number of threads
// nor on the number of tiles in a task.
#ifndef VIM_CPU_SELECTIVE_SCAN_TILE_H_
#define VIM_CPU_SELECTIVE_SCAN_TILE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/math.h"
#include "cpu/rows.h"
#include "vim/selective_scan.h"

namespace vim::cpu {
namespace {

constexpr int kChunkTokens = 32;
constexpr int kChunkStates = 2048;  // tokens x states of B, and of C, held as fp32: 8 KiB each

// What a task holds. Rows of A and of the state: tile after tile, state after state.
template <int kWidth>
struct Workspace {
  Row<kWidth> A[kMaxRows];  // times log2(e), so that the scan needs exp2 only
  Row<kWidth> state[kMaxRows];
  Row<kWidth> bias[kMaxTiles], skip[kMaxTiles];
  Row<kWidth> reach[kMaxTiles];  // the largest |A| of each channel
  Row<kWidth> u[kChunkTokens];   // becomes y
  Row<kWidth> delta[kChunkTokens];
  float B[kChunkStates], C[kChunkStates];
};

// The larger of `most` and |x|. A NaN for x is passed over: it stays one on any way through the scan.
template <typename F>
VIM_INLINE F Farthest(F most, F x) {
  return Larger(BitCast<F>(Bits(x) & 0x7fffffffu), most);
}

// The rows that the next chunk of a tile reads and writes. Each is a short piece, a row's length from the one before,
// which processors do not foresee across pages; asked for one by one while the states of this chunk are computed, they
// are at hand when their turn comes. (All at once was no gain.)
struct Ahead {
  const char* row[4];  // u, delta, y, z; y again where there is no z
  int64_t stride[4];   // bytes
  int tokens;

  VIM_INLINE void FetchNext() {
    if (tokens-- <= 0) return;
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(row[i]);
      row[i] += stride[i];
    }
  }
};

template <typename Io, int kWidth>
VIM_INLINE void LoadStates(float* to, const typename Io::Type* from, int tokens, int states, int64_t token_stride) {
  using Exact = Float32<kWidth>;
  for (int t = 0; t < tokens; ++t) {
    int n = 0;
    for (; n + kWidth <= states; n += kWidth) Exact::Store(to + n, Io::Load(from + n));
    if (n < states) {
      typename Io::Type padded[kWidth] = {};
      float rest[kWidth];
      for (int i = n; i < states; ++i) padded[i - n] = from[i];
      Exact::Store(rest, Io::Load(padded));
      for (int i = n; i < states; ++i) to[i] = rest[i - n];
    }
    to += states;
    from += token_stride;
  }
}

// B and C of a chunk as fp32: where its first token's are, and how far the next.
struct States {
  const float *B, *C;
  int64_t B_step, C_step;
};

// y (in the place of u) = D u + <C, s> for each token of the chunk, and the state moved on. kStates: their number where
// it is known, so that the loop over them unrolls; else 0. kInRange: Exp2InRange will do.
//
// Not inlined, so that all io types share it.
template <int kWidth, int kStates, bool kInRange>
VIM_NOINLINE void ScanTokens(Workspace<kWidth>& work, const States& rows, int tile, int tokens, int any_states,
                             Ahead ahead) {
  using Float = typename Vector<kWidth>::Float;
  constexpr int kParts = kLanes / kWidth;
  const int states = kStates ? kStates : any_states;
  const Row<kWidth>* const A = work.A + tile * states;
  Row<kWidth>* const state = work.state + tile * states;
  for (int t = 0; t < tokens; ++t) {
    ahead.FetchNext();
    const float* const B = rows.B + t * rows.B_step;
    const float* const C = rows.C + t * rows.C_step;
    Float delta[kParts], delta_u[kParts], y[kParts];
    for (int p = 0; p < kParts; ++p) {
      const Float u = work.u[t].part[p];
      delta[p] = work.delta[t].part[p];
      delta_u[p] = delta[p] * u;
      y[p] = work.skip[tile].part[p] * u;
    }
    const auto update = [&](int n) {
      for (int p = 0; p < kParts; ++p) {
        const Float exponent = Unfused(delta[p] * A[n].part[p]);
        const Float decay = kInRange ? Exp2InRange(exponent) : Exp2(exponent);
        const Float s = decay * state[n].part[p] + delta_u[p] * B[n];
        state[n].part[p] = s;
        y[p] += s * C[n];
      }
    };
    int n = 0;
    for (; n + 4 <= states; n += 4) {
      update(n);
      update(n + 1);
      update(n + 2);
      update(n + 3);
    }
    for (; n < states; ++n) update(n);
    for (int p = 0; p < kParts; ++p) work.u[t].part[p] = y[p];
  }
}

// `most`: the largest |delta| of the chunk, channel by channel. A chunk in which no exponent of this tile can leave the
// range of Exp2 skips the clamps, a fifth of the work on 256-bit vectors; steps as large as that are rare.
template <int kWidth>
VIM_INLINE void ScanChunk(Workspace<kWidth>& work, const States& rows, int tile, int tokens, int states,
                          const Row<kWidth>& most, const Ahead& ahead) {
  bool in_range = true;
  for (int p = 0; p < kLanes / kWidth; ++p) {
    const auto farthest = most.part[p] * work.reach[tile].part[p];
    for (int i = 0; i < kWidth; ++i) in_range &= farthest[i] <= -kExp2Low;
  }
  if (states == 16 && in_range) return ScanTokens<kWidth, 16, true>(work, rows, tile, tokens, states, ahead);
  if (in_range) return ScanTokens<kWidth, 0, true>(work, rows, tile, tokens, states, ahead);
  ScanTokens<kWidth, 0, false>(work, rows, tile, tokens, states, ahead);
}

// Which channels of which batch entry a task walks.
struct Place {
  int64_t batch, group, channel;
  int channels, tiles;

  VIM_INLINE Place(const vim_selective_scan_desc& desc, const ScanSplit& split, size_t index) {
    const int64_t task_of_group = static_cast<int64_t>(index) % split.tasks_per_group;
    const int64_t rest = static_cast<int64_t>(index) / split.tasks_per_group;
    const int64_t group_channels = desc.channels / desc.groups;
    const int64_t first = task_of_group * split.tiles_per_task * kLanes;
    const int64_t most = split.tiles_per_task * kLanes;
    group = rest % desc.groups;
    batch = rest / desc.groups;
    channel = group * group_channels + first;
    channels = static_cast<int>(group_channels - first < most ? group_channels - first : most);
    tiles = (channels + kLanes - 1) / kLanes;
  }
  VIM_INLINE int Lanes(int tile) const { return LanesFrom(tile * kLanes, channels); }
};

// One direction over all tokens. `add`: its output is added to what lies in y. `y_scale`, (channels), may be null.
template <typename Io, int kWidth>
VIM_NOINLINE void ScanDirection(Workspace<kWidth>& work, const vim_selective_scan_desc& desc,
                                const vim_selective_scan_args& args, const Place& place, bool add,
                                const float* y_scale) {
  using T = typename Io::Type;
  using Exact = Float32<kWidth>;
  constexpr int kParts = kLanes / kWidth;
  const int states = static_cast<int>(desc.states);

  for (int tile = 0; tile < place.tiles; ++tile) {
    const int64_t at = place.channel + tile * kLanes;
    const int lanes = place.Lanes(tile);
    work.reach[tile] = {};
    for (int n = 0; n < states; ++n) {
      float column[kLanes] = {};
      for (int i = 0; i < lanes; ++i) column[i] = args.A[(at + i) * states + n] * 1.44269504f;
      work.A[tile * states + n] = LoadRow<Exact, kWidth>(column, kLanes);
      work.state[tile * states + n] = {};
      for (int p = 0; p < kParts; ++p)
        work.reach[tile].part[p] = Farthest(work.reach[tile].part[p], work.A[tile * states + n].part[p]);
    }
    work.bias[tile] = desc.has_delta_bias ? LoadRow<Exact, kWidth>(args.delta_bias + at, lanes) : Row<kWidth>{};
    work.skip[tile] = desc.has_D ? LoadRow<Exact, kWidth>(args.D + at, lanes) : Row<kWidth>{};
  }

  // Reverse is the same walk from the other end.
  const int64_t start = desc.reverse ? desc.length - 1 : 0;
  const int64_t direction = desc.reverse ? -1 : 1;
  const auto first = [&](const void* data, int64_t batch_stride, int64_t token_stride, int64_t offset) {
    return static_cast<const T*>(data) + place.batch * batch_stride + start * token_stride + offset;
  };
  const int64_t states_at_B = place.group * desc.B_group_stride, states_at_C = place.group * desc.C_group_stride;
  const T* const u = first(args.u, desc.u_batch_stride, desc.u_token_stride, place.channel);
  const T* const delta = first(args.delta, desc.delta_batch_stride, desc.delta_token_stride, place.channel);
  const T* const z = desc.has_z ? first(args.z, desc.z_batch_stride, desc.z_token_stride, place.channel) : nullptr;
  const T* const B = first(args.B, desc.B_batch_stride, desc.B_token_stride, states_at_B);
  const T* const C = first(args.C, desc.C_batch_stride, desc.C_token_stride, states_at_C);
  T* const y =
      static_cast<T*>(args.y) + place.batch * desc.y_batch_stride + start * desc.y_token_stride + place.channel;
  const int64_t u_stride = direction * desc.u_token_stride;
  const int64_t delta_stride = direction * desc.delta_token_stride;
  const int64_t z_stride = direction * desc.z_token_stride;
  const int64_t B_stride = direction * desc.B_token_stride;
  const int64_t C_stride = direction * desc.C_token_stride;
  const int64_t y_stride = direction * desc.y_token_stride;

  const int chunk = states * kChunkTokens <= kChunkStates ? kChunkTokens : kChunkStates / states;
  for (int64_t done = 0; done < desc.length; done += chunk) {
    const int tokens = static_cast<int>(desc.length - done < chunk ? desc.length - done : chunk);
    States rows = {work.B, work.C, states, states};
    if constexpr (std::is_same<T, float>()) {  // they are read where they are
      rows = {B + done * B_stride, C + done * C_stride, B_stride, C_stride};
    } else {
      LoadStates<Io, kWidth>(work.B, B + done * B_stride, tokens, states, B_stride);
      LoadStates<Io, kWidth>(work.C, C + done * C_stride, tokens, states, C_stride);
    }

    for (int tile = 0; tile < place.tiles; ++tile) {
      const int offset = tile * kLanes;
      const int lanes = place.Lanes(tile);
      Row<kWidth> most = {};
      for (int t = 0; t < tokens; ++t) {
        work.u[t] = LoadRow<Io, kWidth>(u + (done + t) * u_stride + offset, lanes);
        work.delta[t] = LoadRow<Io, kWidth>(delta + (done + t) * delta_stride + offset, lanes);
        for (int p = 0; p < kParts; ++p) work.delta[t].part[p] += work.bias[tile].part[p];
      }
      if (desc.delta_softplus) {
        for (int t = 0; t < tokens; ++t)
          for (int p = 0; p < kParts; ++p) work.delta[t].part[p] = Softplus(work.delta[t].part[p]);
      }
      for (int t = 0; t < tokens; ++t)
        for (int p = 0; p < kParts; ++p) most.part[p] = Farthest(most.part[p], work.delta[t].part[p]);

      const int64_t later = desc.length - done - tokens;
      Ahead ahead = {};
      if (later > 0) {
        const auto row = [&](const T* data, int64_t stride) {
          return reinterpret_cast<const char*>(data + (done + chunk) * stride + offset);
        };
        const T* const gate = z != nullptr ? z : y;
        const int64_t gate_stride = z != nullptr ? z_stride : y_stride;
        constexpr int64_t kSize = sizeof(T);
        ahead = {{row(u, u_stride), row(delta, delta_stride), row(y, y_stride), row(gate, gate_stride)},
                 {u_stride * kSize, delta_stride * kSize, y_stride * kSize, gate_stride * kSize},
                 static_cast<int>(later < chunk ? later : chunk)};
      }
      ScanChunk<kWidth>(work, rows, tile, tokens, states, most, ahead);

      // A loop for each step: what a step needs then stays in registers.
      const auto row_of = [&](auto* data, int64_t stride, int t) { return data + (done + t) * stride + offset; };
      if (add) {
        for (int t = 0; t < tokens; ++t) {
          const auto other = LoadRow<Io, kWidth>(row_of(y, y_stride, t), lanes);
          for (int p = 0; p < kParts; ++p) work.u[t].part[p] += other.part[p];
        }
      }
      if (z != nullptr) {
        for (int t = 0; t < tokens; ++t) {
          const auto gate = LoadRow<Io, kWidth>(row_of(z, z_stride, t), lanes);
          for (int p = 0; p < kParts; ++p) work.u[t].part[p] *= Silu(gate.part[p]);
        }
      }
      if (y_scale != nullptr) {
        const auto scale = LoadRow<Exact, kWidth>(y_scale + place.channel + offset, lanes);
        for (int t = 0; t < tokens; ++t)
          for (int p = 0; p < kParts; ++p) work.u[t].part[p] *= scale.part[p];
      }
      for (int t = 0; t < tokens; ++t) StoreRow<Io, kWidth>(row_of(y, y_stride, t), work.u[t], lanes);
    }
  }
}

template <int kWidth>
void RunScan(const Scan& scan, size_t index) {
  const Place place(*scan.desc, scan.split, index);
  WithIo<kWidth>(scan.desc->io, [&](auto io) {
    Workspace<kWidth> work;
    ScanDirection<decltype(io), kWidth>(work, *scan.desc, *scan.args, place, false, nullptr);
  });
}

template <int kWidth>
void RunBiScan(const BiScan& scan, size_t index) {
  const Place place(scan.desc[0], scan.split, index);
  WithIo<kWidth>(scan.desc[0].io, [&](auto io) {
    Workspace<kWidth> work;
    for (int i = 0; i < 2; ++i)
      ScanDirection<decltype(io), kWidth>(work, scan.desc[i], scan.args[i], place, i == 1,
                                          i == 1 ? scan.y_scale : nullptr);
  });
}

}  // namespace
}  // namespace vim::cpu

#endif  // VIM_CPU_SELECTIVE_SCAN_TILE_H_
