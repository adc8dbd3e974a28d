// A CUDA kernel on the CPU, to check what it computes and that its barriers suffice, without a card.
//
// Each thread of a block is a fiber that runs until it waits: at the block's barrier or, in a shuffle, for its warp.
// Who runs next is up to `order`: 0 the first of those who can, 1 the last, others at random. A kernel in which a
// thread reads what another writes between the same two barriers gives other results in some order. Shared memory
// starts as NaN. No timing, no clusters, one block after another.
//
// Included before any kernel. tests/cuda_on_cpu.py puts these functions in the place of what only nvcc understands.
#ifndef VIM_TESTS_CUDA_ON_CPU_H_
#define VIM_TESTS_CUDA_ON_CPU_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

// nvcc's words that the headers leave for it.
#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim;

namespace vim::cuda {
alignas(16) inline unsigned char shared_memory[1 << 18];
}

namespace emulated {

constexpr size_t kMostShared = 227 * 1024;  // of a block on an H100
inline int order = 0;
inline bool refused = false;  // a launch that no card would take

class Block {
 public:
  Block(unsigned threads, std::function<void()> body)
      : body_(std::move(body)), random_(static_cast<unsigned>(order)), fibers_(threads), warps_((threads + 31) / 32) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.resize(1 << 16);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::Enter, 0);
      ready_.push_back(i);
    }
  }

  void Run() {
    running = this;
    std::memset(vim::cuda::shared_memory, 0xff, sizeof(vim::cuda::shared_memory));
    size_t done = 0;
    while (done < fibers_.size()) {
      if (ready_.empty()) {
        if (at_barrier_[0].size() != fibers_.size() - done) Fail("some wait for the block, others for something else");
        Release(0);
      }
      const size_t next = order == 0 ? 0 : order == 1 ? ready_.size() - 1 : random_() % ready_.size();
      current_ = ready_[next];
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(next));
      threadIdx.x = current_;
      swapcontext(&scheduler_, &fibers_[current_].context);
      done += fibers_[current_].done;
    }
  }

  // Barrier `id` of `count` threads; 0 is the whole block's.
  void WaitFor(int id, unsigned count = 0) {
    at_barrier_[id].push_back(current_);
    if (id != 0 && at_barrier_[id].size() == count) Release(id);
    Yield();
  }

  // What lane `from` of this warp gives in the same exchange; the caller's own where there is no such lane.
  float Exchange(float value, int from) {
    const std::array<float, 32> all = Gather(value);
    return from < 0 ? value : all[from];
  }

  // What every lane of this warp gives.
  std::array<float, 32> Gather(float value) {
    Warp& warp = warps_[current_ / 32];
    const unsigned turn = fibers_[current_].exchanges++ & 1;
    warp.values[turn][Lane()] = value;
    warp.waiting.push_back(current_);
    if (warp.waiting.size() == 32) {
      ready_.insert(ready_.end(), warp.waiting.begin(), warp.waiting.end());
      warp.waiting.clear();
    }
    Yield();
    return warp.values[turn];
  }

  int Lane() const { return static_cast<int>(current_ % 32); }

  inline static Block* running = nullptr;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned exchanges = 0;
    bool done = false;
  };
  struct Warp {
    std::array<float, 32> values[2];
    std::vector<unsigned> waiting;
  };

  static void Enter() {
    running->body_();
    running->fibers_[running->current_].done = true;
  }
  void Release(int id) {
    std::vector<unsigned>& waiting = at_barrier_[id];
    std::sort(waiting.begin(), waiting.end());
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  void Yield() { swapcontext(&fibers_[current_].context, &scheduler_); }
  [[noreturn]] static void Fail(const char* why) {
    std::fprintf(stderr, "deadlock: %s\n", why);
    std::abort();
  }

  std::function<void()> body_;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_;
  std::map<int, std::vector<unsigned>> at_barrier_;
  unsigned current_ = 0;
  ucontext_t scheduler_;
};

template <typename Kernel, typename... Args>
void Launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, const Args&... args) {
  refused = shared > kMostShared || threads > 1024;
  if (refused) return;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) Block(threads, [&] { kernel(args...); }).Run();
}

// lanes.cuh's functions of these names.
inline void ScanStep(float& decay, float& state, int offset) {
  const int from = Block::running->Lane() - offset;
  const float s = Block::running->Exchange(state, from), d = Block::running->Exchange(decay, from);
  if (from < 0) return;
  state = std::fma(decay, s, state);
  decay *= d;
}
inline void FromLaneBefore(float value, float& first, int offset) {
  const int from = Block::running->Lane() - offset;
  const float before = Block::running->Exchange(value, from);
  if (from >= 0) first = before;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::running->WaitFor(0); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulated::Block::running->Exchange(value, emulated::Block::running->Lane() ^ mask);
}
inline float __shfl_up_sync(unsigned, float value, int offset) {
  return emulated::Block::running->Exchange(value, emulated::Block::running->Lane() - offset);
}
inline float __shfl_sync(unsigned, float value, int from) { return emulated::Block::running->Exchange(value, from); }
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto all = emulated::Block::running->Gather(value ? 1.0f : 0.0f);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned{all[lane] != 0.0f} << lane;
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
using std::max;
using std::min;

#endif  // VIM_TESTS_CUDA_ON_CPU_H_
