// A launch: the shared memory it asks for, and what it has to do with its neighbours.
#ifndef VIM_KERNELS_CUDA_LAUNCH_CUH_
#define VIM_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vim::cuda {

enum class Launch {
  kAlone,
  kBlocksInPairs,    // clusters of two blocks, sm_90 and later
  kBesideTheBefore,  // begins while the launch before ends, sm_90 and later: WaitForLaunchBefore
};

// Blocks of a launch that may begin beside the one before do so when all blocks of that one have let them, and there is
// room; they wait where they need what it wrote.
__device__ __forceinline__ void LetNextLaunchBegin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void WaitForLaunchBefore() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// `shared`: bytes of dynamic shared memory of a block.
template <typename... Args>
cudaError_t LaunchKernel(void (*kernel)(Args...), Launch how, int64_t blocks, int threads, size_t shared,
                         cudaStream_t stream, const Args&... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
#if CUDART_VERSION >= 11080  // those before know no such card
  if (how != Launch::kAlone) {
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    if (how == Launch::kBlocksInPairs) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = 2;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
  }
#endif
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace vim::cuda

#endif  // VIM_KERNELS_CUDA_LAUNCH_CUH_
