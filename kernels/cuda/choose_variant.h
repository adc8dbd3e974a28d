// Which kernel serves which sizes: pure host functions, no CUDA.
#ifndef VIM_KERNELS_CUDA_CHOOSE_VARIANT_H_
#define VIM_KERNELS_CUDA_CHOOSE_VARIANT_H_

#include <cstddef>
#include <cstdint>

#include "vim/selective_scan_cuda.h"

namespace vim::cuda {

// What the choice may depend on, of one direction or a pair.
struct Sizes {
  int64_t batch, length, channels, states, groups;
  int element_bytes;
  bool pair;
  int row_alignment;    // bytes, at most 16: what divides the rows of u, delta, z and y, and channels
  bool states_aligned;  // rows of B and C start on four states
  int64_t longest_row;  // elements from a token to the next, of any operand
  bool workspace;       // there is one
};

// Of the instances tried (benchmarks/notes.md), those that won somewhere, and of the lanes form three that did once.
// Since the states form cuts long sequences into chunks, the lanes form has those for which there is no workspace.
//
// Instances of the lanes form, (tokens, lanes, channels). 6 and 12 channels a block spread Vim's 384 and 768 channels
// at batch 1 over 128 of an H100's 132 SMs.
#define VIM_LANES_INSTANCES(X) \
  X(13, 8, 16)                 \
  X(13, 16, 6)                 \
  X(13, 16, 12)                \
  X(16, 8, 16)                 \
  X(16, 32, 6)

// Instances of the states form, (lanes, channels, tile, items, rows a lane, whether B and C have helpers of their own,
// blocks an SM is to hold). 24 channels a block make 128 blocks of Vim-Ti at batch 8, one an SM. Those with helpers
// apart are not measured yet, and nowhere chosen.
#define VIM_STATES_INSTANCES(X) \
  X(16, 4, 64, 1, 1, 0, 1)      \
  X(16, 4, 128, 1, 1, 0, 1)     \
  X(16, 12, 64, 2, 1, 0, 1)     \
  X(8, 8, 64, 1, 1, 0, 1)       \
  X(8, 24, 32, 2, 2, 0, 1)      \
  X(8, 24, 32, 2, 3, 0, 1)      \
  X(4, 16, 32, 2, 1, 0, 3)      \
  X(2, 32, 32, 4, 1, 0, 2)      \
  X(16, 4, 64, 1, 1, 1, 1)      \
  X(8, 8, 64, 1, 1, 1, 1)       \
  X(8, 12, 64, 2, 1, 1, 1)

// Of these, the ones that can also scan in chunks: where few rows leave most of an SM idle, chunks make it more of
// them.
#define VIM_STATES_CHUNKED(X) \
  X(8, 24, 32, 2, 2, 0, 1)    \
  X(8, 24, 32, 2, 3, 0, 1)    \
  X(4, 16, 32, 2, 1, 0, 3)    \
  X(2, 32, 32, 4, 1, 0, 2)

// Threads, registers and shared memory of the states form.
struct StatesSizes {
  static constexpr int kMostChunks = 16;
  // No row of the table cuts more rows (of all directions: Vim-B at batch 1 has 3072), or shorter sequences.
  static constexpr int64_t kMostChunkedRows = 4096, kLeastChunkedLength = 320;
  // Bytes in which chunks of these sizes leave what the next ones begin with; 0 where there are to be none.
  static constexpr size_t Workspace(int64_t rows, int64_t length, int64_t states) {
    if (rows > kMostChunkedRows || length < kLeastChunkedLength || states != 16) return 0;
    return static_cast<size_t>(rows) * kMostChunks * 16 * 8;
  }
  static constexpr int kCarryChannels = 16;  // of a block of the launch that works out what chunks leave
  static constexpr int kPad = 4;  // floats after a row of tokens: eight rows then start in eight groups of four banks
  // Floats from four channels' tokens to the next four's: so that the helpers' threads, each with four channels of a
  // token, come to 32 banks, and quads half a block apart are 16 banks apart.
  static constexpr int QuadPitch(int channels, int tile) {
    return 4 * (tile + kPad) + (channels <= 8 ? 0 : channels == 16 ? 8 : 4);
  }
  // Threads of one direction: those that scan, those that have rows of u, Delta, z and y, and those that have B and C,
  // which are the same or, `apart`, others.
  static constexpr int Scanning(int lanes, int channels, int rows) { return lanes * channels / rows; }
  static constexpr int Helping(int channels, int tile, int items) { return tile * channels / 4 / items; }
  static constexpr int StateHelping(int channels, int tile, int items, int apart) {
    return apart ? tile : Helping(channels, tile, items);
  }
  static constexpr int64_t kLongestRow = INT32_MAX / 1024;  // so that four tiles of rows are counted in 32 bits
  static constexpr int Threads(int lanes, int channels, int tile, int items, int rows, int apart, int directions) {
    return directions * (Scanning(lanes, channels, rows) + Helping(channels, tile, items) + (apart ? tile : 0));
  }
  // Of four states of four tokens, a thread that has B and C.
  static constexpr int StateItems(int channels, int tile, int items, int apart) {
    const int threads = StateHelping(channels, tile, items, apart);
    return (2 * tile + threads - 1) / threads;
  }
  static constexpr size_t Bytes(int channels, int tile) {  // of one direction
    return size_t{4} * (2 * (32 * (tile + kPad) + 3 * channels / 4 * QuadPitch(channels, tile)) + 3 * channels);
  }
};

constexpr int kLanesMaxThreads = 384;  // leaves a thread 168 registers

// Whether `variant` can run these sizes on this SM.
bool CanRun(const vim_scan_variant& variant, const Sizes& sizes, int sm);

vim_scan_variant Choose(const Sizes& sizes, int sm);

// Sizes of the lanes form's shared memory, for the kernel and for CanRun.
struct LanesSizes {
  static constexpr int Max(int a, int b) { return a > b ? a : b; }

  // Elements of a row of `channels` moved at a time: 16, 8 or 4 bytes (8 in fp32).
  static constexpr int Piece(int channels, int element_bytes) {
    int piece = 16 / element_bytes;
    while (channels % piece != 0) piece /= 2;
    return piece;
  }
  static constexpr int Quads(int tokens) { return (tokens + 3) / 4; }
  // 8 floats of padding put the quads of a lane, which are written together, into different banks.
  static constexpr int QuadFloats(int lanes) { return lanes * 4 + 8; }
  // 16 bytes of padding against conflicts between the rows that a transpose reads.
  static constexpr int RowElements(int element_bytes) { return 32 + 16 / element_bytes; }

  // The most lanes that meet in one bank when lanes read words `stride` bytes apart.
  static constexpr int Conflicts(int lanes, int stride) {
    int worst = 0;
    for (int a = 0; a < lanes; ++a) {
      int same = 0;
      for (int b = 0; b < lanes; ++b) same += a * stride / 4 % 32 == b * stride / 4 % 32;
      worst = Max(worst, same);
    }
    return worst;
  }
  // Elements from one lane's tokens to the next lane's: padded by as many pieces as conflict least.
  static constexpr int LaneElements(int tokens, int lanes, int channels, int element_bytes) {
    const int piece = Piece(channels, element_bytes);
    int best = tokens * channels;
    for (int pad = 1; pad <= 8; ++pad) {
      const int stride = tokens * channels + pad * piece;
      if (Conflicts(lanes, stride * element_bytes) < Conflicts(lanes, best * element_bytes)) best = stride;
    }
    return best;
  }
  static constexpr int OutputLane(int tokens, int channels) { return tokens * (channels + 1) | 1; }  // odd
  static constexpr int OutputFloats(int tokens, int lanes, int channels) {
    return (lanes * OutputLane(tokens, channels) + 3) / 4 * 4;
  }

  // Of one direction in a block.
  static constexpr size_t Bytes(int tokens, int lanes, int channels, int split, int element_bytes) {
    const size_t planes = size_t{32} * Quads(tokens) * QuadFloats(lanes) * 4;
    const size_t small = size_t{2} * channels * 16 * 4;
    const size_t rows = (size_t{1} * tokens * lanes * RowElements(element_bytes) * element_bytes + 15) / 16 * 16;
    const size_t inputs = size_t{2} * lanes * LaneElements(tokens, lanes, channels, element_bytes) * element_bytes;
    const size_t late = (size_t{2} * tokens * lanes * channels * element_bytes + 15) / 16 * 16;
    return planes + small + rows + (inputs + 15) / 16 * 16 + late +
           size_t{4} * split * OutputFloats(tokens, lanes, channels);
  }
};

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_CHOOSE_VARIANT_H_
