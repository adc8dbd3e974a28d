// An anchor for benchmarks/scan.py: a sequential scan in the style in which TensorRT-LLM's Mamba-1 kernel is described,
// written from that description. One thread a channel, 16 states in registers, the whole length in order; 128 threads
// copy ahead into a ring in shared memory while 128 compute; B and C are converted by every thread; the exponential
// takes its log2(e) multiply; softplus is log(1 + exp). One direction a launch, channel-last, gate and skip fused.
// Also: the rate of the exponential unit.
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr int kChannels = 128, kStates = 16, kUnroll = 6, kStages = 3;

template <typename T>
__device__ float F(T x) {
  return static_cast<float>(x);
}

__device__ void Copy(void* to, const void* from, int bytes) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
}

template <typename T>
struct Stage {
  T u[kUnroll][kChannels], delta[kUnroll][kChannels], z[kUnroll][kChannels];
  T states[kUnroll][2 * kStates];
};

template <typename T>
__global__ void __launch_bounds__(256)
    Scan(int length, int channels, int row, int rank, int reverse, const T* u, const T* delta, const float* A,
         const T* x_dbl, const float* D, const T* z, const float* bias, T* y) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* ring = reinterpret_cast<Stage<T>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * length;
  const int channel0 = blockIdx.x * kChannels, thread = threadIdx.x % 128;
  const bool producer = threadIdx.x >= 128;
  const int steps = (length + kUnroll - 1) / kUnroll;
  auto token_of = [&](int t) { return first + (reverse ? length - 1 - t : t); };
  auto produce = [&](int step) {
    if (step < steps) {
      Stage<T>& s = ring[step % kStages];
      constexpr int kPiece = 16 / sizeof(T), kRow = kChannels / kPiece, kSmall = 8 / sizeof(T);
      for (int i = thread; i < kUnroll * kRow; i += 128) {
        const int t = i / kRow, c = i % kRow * kPiece;
        if (step * kUnroll + t >= length) break;
        const int64_t at = token_of(step * kUnroll + t) * channels + channel0 + c;
        Copy(&s.u[t][c], u + at, 16);
        Copy(&s.delta[t][c], delta + at, 16);
        Copy(&s.z[t][c], z + at, 16);
      }
      for (int i = thread; i < kUnroll * 2 * kStates / kSmall; i += 128) {
        const int t = i / (2 * kStates / kSmall), n = i % (2 * kStates / kSmall) * kSmall;
        if (step * kUnroll + t >= length) break;
        Copy(&s.states[t][n], x_dbl + token_of(step * kUnroll + t) * row + rank + n, 8);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float a[kStates], state[kStates] = {}, skip = 0, b = 0;
  const int channel = channel0 + thread;
  if (producer) {
    for (int s = 0; s < kStages - 1; ++s) produce(s);
  } else {
    for (int n = 0; n < kStates; ++n) a[n] = A[channel * kStates + n];
    skip = D[channel];
    b = bias[channel];
  }
  for (int step = 0; step < steps; ++step) {
    if (producer) asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    if (producer) {
      produce(step + kStages - 1);
      continue;
    }
    const Stage<T>& s = ring[step % kStages];
#pragma unroll
    for (int t = 0; t < kUnroll; ++t) {
      if (step * kUnroll + t < length) {
        float d = F(s.delta[t][thread]) + b;
        d = d <= 20.f ? __logf(1.f + __expf(d)) : d;
        const float x = F(s.u[t][thread]), gain = d * x, g = F(s.z[t][thread]);
        float out = skip * x;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          state[n] = __expf(d * a[n]) * state[n] + gain * F(s.states[t][n]);
          out += state[n] * F(s.states[t][kStates + n]);
        }
        out *= g / (1.f + __expf(-g));
        y[token_of(step * kUnroll + t) * channels + channel] = static_cast<T>(out);
      }
    }
  }
}

template <typename T>
int Launch(int batch, int length, int channels, int row, int rank, int reverse, const void* u, const void* delta,
           const void* A, const void* x_dbl, const void* D, const void* z, const void* bias, void* y, void* stream) {
  const int bytes = kStages * sizeof(Stage<T>);
  cudaFuncSetAttribute(Scan<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  Scan<T><<<dim3(channels / kChannels, batch), 256, bytes, static_cast<cudaStream_t>(stream)>>>(
      length, channels, row, rank, reverse, static_cast<const T*>(u), static_cast<const T*>(delta),
      static_cast<const float*>(A), static_cast<const T*>(x_dbl), static_cast<const float*>(D),
      static_cast<const T*>(z), static_cast<const float*>(bias), static_cast<T*>(y));
  return cudaGetLastError();
}

__global__ void Exponentials(float* out, int rounds) {
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = threadIdx.x * -1e-3f - i * 0.1f;
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i % 8]));
  }
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  if (sum == 12345.f) out[0] = sum;
}

}  // namespace

// u, delta, z, y (batch, length, channels), channels a multiple of 128; x_dbl (batch, length, row).
extern "C" int sequential_style_scan(int half, int batch, int length, int channels, int row, int rank, int reverse,
                                     const void* u, const void* delta, const void* A, const void* x_dbl, const void* D,
                                     const void* z, const void* bias, void* y, void* stream) {
  return (half ? Launch<__half> : Launch<float>)(batch, length, channels, row, rank, reverse, u, delta, A, x_dbl, D, z,
                                                 bias, y, stream);
}

// blocks * 1024 * rounds * 64 exponentials.
extern "C" int exponentials(void* out, int blocks, int rounds, void* stream) {
  Exponentials<<<blocks, 1024, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<float*>(out), rounds);
  return cudaGetLastError();
}
