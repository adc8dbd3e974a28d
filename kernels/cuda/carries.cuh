// What each chunk of a sequence makes of the states it begins with, for the chunks after it to begin with (states.cuh).
//
// What a chunk adds is a sum over its tokens and not a recurrence: token t counts with the decay that the Delta of all
// tokens after it make. So a chunk is walked from its end, many tokens at once, and a state is left when what is
// further back is forgotten: of 760 tokens of Vim's initial Delta the slowest needs all, the fastest one in sixteen.
//
// A block has 16 channels of one direction, a warp four of them. A lane has two tokens of a step and all states: 64
// sums, which are added up over the lanes at the end. u, Delta and B come by cp.async, two steps ahead.
#ifndef VIM_KERNELS_CUDA_CARRIES_CUH_
#define VIM_KERNELS_CUDA_CARRIES_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/choose_variant.h"
#include "cuda/copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/params.h"
#include "cuda/warp.cuh"

namespace vim::cuda {

template <typename IO>
struct alignas(16) CarriesShared {
  static constexpr int kStages = 3, kTokens = 64, kQuads = StatesSizes::kCarryChannels / 4;
  // Four elements a piece, four pieces a token; a fifth puts the pieces that a warp reads at once into all banks.
  // Tokens in walking order, every second one first: a lane's two are 32 apart, its neighbours' next to them.
  using Rows = typename Element<IO>::Bits4[kTokens][kQuads + 1];
  Rows u[kStages], delta[kStages], B[kStages];
  float A[StatesSizes::kCarryChannels][kStates];  // times log2(e)
  int alive[2][kQuads];                           // [step's parity][warp]: whether it has something to add
  static constexpr __device__ int Place(int token) { return token % 2 * (kTokens / 2) + token / 2; }
};

template <typename IO>
__global__ void __launch_bounds__(32 * StatesSizes::kCarryChannels / 4, 3)
    ScanCarries(const __grid_constant__ Params p) {
  using E = Element<IO>;
  using Bits = typename E::Bits;
  using Shared = CarriesShared<IO>;
  constexpr int kTokens = Shared::kTokens, kStages = Shared::kStages, kQuads = Shared::kQuads;
  constexpr bool kFloat32 = std::is_same_v<IO, float>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  LetNextLaunchBegin();

  constexpr int kChannels = StatesSizes::kCarryChannels;
  const int channel_blocks = (p.channels + kChannels - 1) / kChannels;
  const int first_channel = blockIdx.x % channel_blocks * kChannels;
  int rest = blockIdx.x / channel_blocks;
  const int side = p.pair ? rest % 2 : 0;
  rest >>= p.pair;
  const bool reverse = (p.pair ? side : p.reverse) != 0;
  // Nothing begins with what the last chunk of a direction makes.
  const int chunk = rest % (p.chunks - 1) + reverse;
  const int64_t batch = rest / (p.chunks - 1);
  const int first_token = chunk * p.chunk_tokens;
  const int length = min(p.length - first_token, p.chunk_tokens);
  const Direction& direction = p.direction[side];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_first = first_channel + 4 * warp;
  for (int i = threadIdx.x; i < kChannels * kStates; i += 32 * kQuads)
    shared.A[i / kStates][i % kStates] =
        first_channel + i / kStates < p.channels ? direction.A[first_channel * kStates + i] * kLog2e : 0.0f;

  // A thread copies one piece of tokens kCopied apart.
  constexpr int kCopied = 32 * kQuads / 4, kCopies = kTokens / kCopied;
  const int piece = threadIdx.x % 4, row = threadIdx.x / 4;
  const bool has_piece = first_channel + 4 * piece < p.channels;
  const int64_t from = first_token + (reverse ? row : length - 1 - row);
  const int sign = reverse ? kCopied : -kCopied;
  const int64_t u_step = sign * direction.u_token, delta_step = sign * direction.delta_token;
  const int64_t B_step = sign * direction.B_token;
  const Bits* u = static_cast<const Bits*>(direction.u) + batch * direction.u_batch + from * direction.u_token +
                  first_channel + 4 * piece;
  const Bits* delta = static_cast<const Bits*>(direction.delta) + batch * direction.delta_batch +
                      from * direction.delta_token + first_channel + 4 * piece;
  const Bits* B = static_cast<const Bits*>(direction.B) + batch * direction.B_batch + from * direction.B_token +
                  first_channel / p.channels_per_group * direction.B_group + 4 * piece;
  auto copy = [&](int step) {
    constexpr int kBytes = 4 * sizeof(Bits);
    const int stage = step % kStages;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = row + i * kCopied, place = Shared::Place(token);
      const bool exists = step * kTokens + token < length;
      CopyAsync<kBytes>(&shared.u[stage][place][piece], u, exists && has_piece);
      CopyAsync<kBytes>(&shared.delta[stage][place][piece], delta, exists && has_piece);
      CopyAsync<kBytes>(&shared.B[stage][place][piece], B, exists);
      u += u_step;
      delta += delta_step;
      B += B_step;
    }
  };

  float4 bias = {};
  if (direction.delta_bias && own_first < p.channels)
    bias = make_float4(direction.delta_bias[own_first], direction.delta_bias[own_first + 1],
                       direction.delta_bias[own_first + 2], direction.delta_bias[own_first + 3]);
  // What a decay below 2 to this leaves is less than the rounding of 16-bit outputs by far, and than that of fp32.
  // Without softplus Delta may be negative, and what was forgotten come back.
  const float forgotten = p.delta_softplus ? (kFloat32 ? -24.0f : -16.0f) : -INFINITY;
  float sums[4 * kStates] = {}, passed[4] = {};  // passed: Delta of the tokens seen
  uint32_t alive[2] = {~0u, ~0u};  // of two channels each, a bit of four for four states: whether one is not forgotten

  const int steps = (length + kTokens - 1) / kTokens;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step);
    CopyCommit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    CopyWaitBut<kStages - 2>();
    __syncthreads();  // this step's rows are there, and those before it are done with
    if (step > 0) {
      int any = 0;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) any |= shared.alive[(step - 1) & 1][i];
      if (any == 0) break;
    }
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    CopyCommit();
    if ((alive[0] | alive[1]) == 0) {
      if (lane == 0) shared.alive[step & 1][warp] = 0;
      continue;
    }

    const int stage = step % kStages;
    float gain[2][4], after[2][4];  // after: Delta of the tokens after it
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float4 delta4 = E::ToFloat4(shared.delta[stage][lane + k * 32][warp]);
#pragma unroll
      for (int c = 0; c < 4; ++c) after[k][c] = At(delta4, c) + At(bias, c);
    }
    if (p.delta_softplus) SoftplusEach<kFloat32, 8>(&after[0][0]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float4 u4 = E::ToFloat4(shared.u[stage][lane + k * 32][warp]);
      const bool exists = step * kTokens + 2 * lane + k < length;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        gain[k][c] = after[k][c] * At(u4, c);
        if (!exists) after[k][c] = 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float first = after[0][c], both = first + after[1][c];
      const float sum = SumOfLanesUpTo(both, lane);
      after[0][c] = passed[c] + (sum - both);
      after[1][c] = after[0][c] + first;
      passed[c] += __shfl_sync(0xffffffffu, sum, 31);
    }
#pragma unroll
    for (int four = 0; four < 4; ++four) {
      constexpr uint32_t kEither = 0x00010001;
      if (((alive[0] | alive[1]) & kEither << 4 * four) == 0) continue;
      const float4 b[2] = {E::ToFloat4(shared.B[stage][lane][four]), E::ToFloat4(shared.B[stage][lane + 32][four])};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if ((alive[c / 2] >> (16 * (c % 2) + 4 * four) & 1) == 0) continue;
        const float4 A = *reinterpret_cast<const float4*>(&shared.A[4 * warp + c][4 * four]);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float& sum = sums[c * kStates + 4 * four + n];
            sum = fmaf(Exp2(At(A, n) * after[k][c]), gain[k][c] * At(b[k], n), sum);
          }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = 2 * i + lane / kStates;
      const float decays =
          shared.A[4 * warp + c][lane % kStates] * (lane < kStates ? passed[2 * i] : passed[2 * i + 1]);
      uint32_t each = __ballot_sync(0xffffffffu, decays > forgotten);
      each |= each >> 1;
      alive[i] = (each | each >> 2) & 0x11111111;
    }
    if (lane == 0) shared.alive[step & 1][warp] = (alive[0] | alive[1]) != 0;
  }

  // Of 64 sums, lane l gets 2 l and the next.
#pragma unroll
  for (int half = 2 * kStates; half >= 2; half /= 2) HalveSum<2 * kStates>(sums, half, half / 2, lane & (half / 2));
  const int c = lane / 8, n = lane % 8 * 2;
  if (own_first >= p.channels) return;
  const float all = c < 2 ? (c == 0 ? passed[0] : passed[1]) : (c == 2 ? passed[2] : passed[3]);
  const float* const A = shared.A[4 * warp + c];
  Carry* const to = static_cast<Carry*>(p.workspace) +
                    (((batch << p.pair) + side) * p.chunks + chunk) * p.channels * kStates +
                    int64_t{own_first + c} * kStates + n;
  *reinterpret_cast<float4*>(to) = make_float4(sums[0], Exp2(A[n] * all), sums[1], Exp2(A[n + 1] * all));
}

// Fills params.workspace but for what nothing begins with.
template <typename IO>
cudaError_t LaunchCarries(const Params& params, cudaStream_t stream) {
  const int channel_blocks = (params.channels + StatesSizes::kCarryChannels - 1) / StatesSizes::kCarryChannels;
  const int64_t blocks = int64_t{channel_blocks} * params.batch * (params.chunks - 1) << params.pair;
  return LaunchKernel(ScanCarries<IO>, Launch::kAlone, blocks, 32 * CarriesShared<IO>::kQuads,
                      sizeof(CarriesShared<IO>), stream, params);
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_CARRIES_CUH_
