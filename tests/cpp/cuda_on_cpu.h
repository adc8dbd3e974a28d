// A CUDA kernel on the CPU, to check what it computes and that its barriers suffice, without a card.
//
// Each thread of a block is a fiber that runs until it waits: at the block's barrier or, in a shuffle, for its warp.
// Who runs next is up to `order`: 0 the first of those who can, 1 the last, others at random. A kernel in which a
// thread reads what another writes between the same two barriers gives other results in some order. Shared memory
// starts as NaN. No timing, no divergence within a warp but at shuffles, one block after another.
//
// Included before any kernel, in place of the runtime's own launch.
#ifndef VIM_TESTS_CUDA_ON_CPU_H_
#define VIM_TESTS_CUDA_ON_CPU_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
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
inline EmulatedIndex threadIdx, blockIdx;

namespace vim::cuda {
alignas(16) inline unsigned char shared_memory[1 << 18];
}

namespace emulated {

inline int order = 0;

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
        if (at_barrier_.size() != fibers_.size() - done) Fail("some wait for the block, others for their warp");
        ready_.swap(at_barrier_);
        std::sort(ready_.begin(), ready_.end());
      }
      const size_t next = order == 0 ? 0 : order == 1 ? ready_.size() - 1 : random_() % ready_.size();
      current_ = ready_[next];
      ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(next));
      threadIdx.x = current_;
      swapcontext(&scheduler_, &fibers_[current_].context);
      done += fibers_[current_].done;
    }
  }

  void WaitForBlock() {
    at_barrier_.push_back(current_);
    Yield();
  }

  float Shuffle(float value, int mask) {
    Warp& warp = warps_[current_ / 32];
    const unsigned lane = current_ % 32, turn = fibers_[current_].shuffles++ & 1;
    warp.values[turn][lane] = value;
    warp.waiting.push_back(current_);
    if (warp.waiting.size() == 32) {
      ready_.insert(ready_.end(), warp.waiting.begin(), warp.waiting.end());
      warp.waiting.clear();
    }
    Yield();
    return warp.values[turn][lane ^ static_cast<unsigned>(mask)];
  }

  inline static Block* running = nullptr;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned shuffles = 0;
    bool done = false;
  };
  struct Warp {
    float values[2][32];
    std::vector<unsigned> waiting;
  };

  static void Enter() {
    running->body_();
    running->fibers_[running->current_].done = true;
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
  std::vector<unsigned> ready_, at_barrier_;
  unsigned current_ = 0;
  ucontext_t scheduler_;
};

template <typename Kernel, typename Params>
void Launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, const Params& params) {
  if (shared > sizeof(vim::cuda::shared_memory)) std::abort();
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) Block(threads, [&] { kernel(params); }).Run();
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::running->WaitForBlock(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return emulated::Block::running->Shuffle(value, mask); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
using std::min;

#endif  // VIM_TESTS_CUDA_ON_CPU_H_
