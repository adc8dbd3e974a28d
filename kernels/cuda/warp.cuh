// What lanes of a warp work out together.
#ifndef VIM_KERNELS_CUDA_WARP_CUH_
#define VIM_KERNELS_CUDA_WARP_CUH_

namespace vim::cuda {

// One round of summing over lanes: of y[0 .. 2 half) a lane keeps one half, the partner `apart` lanes away the other.
template <int kMost>
__device__ __forceinline__ void HalveSum(float* y, int half, int apart, bool upper) {
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i >= half) break;
    const float send = upper ? y[i] : y[i + half];
    const float keep = upper ? y[i + half] : y[i];
    y[i] = keep + __shfl_xor_sync(0xffffffffu, send, apart);
  }
}

// Of the lanes before this one and its own.
__device__ __forceinline__ float SumOfLanesUpTo(float x, int lane) {
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, x, apart);
    if (lane >= apart) x += before;
  }
  return x;
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_WARP_CUH_
