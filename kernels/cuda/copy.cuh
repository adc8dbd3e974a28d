// Asynchronous copies from global to shared memory, with a plain form for SMs and alignments that lack one.
#ifndef VIM_KERNELS_CUDA_COPY_CUH_
#define VIM_KERNELS_CUDA_COPY_CUH_

#include <cstdint>

namespace vim::cuda {

// Copies kBytes (4, 8, 16), or writes zeros when !valid; both addresses are multiples of kBytes.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(shared) = valid ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
  } else {
    *static_cast<uint32_t*>(shared) = valid ? *static_cast<const uint32_t*>(global) : 0;
  }
#endif
}

// All copies this thread has issued are done; a barrier must follow before other threads read them.
__device__ __forceinline__ void CopyWait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void CopyCommit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All groups of this thread but the last kPending are done; a barrier must follow as well.
template <int kPending>
__device__ __forceinline__ void CopyWaitBut() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_COPY_CUH_
