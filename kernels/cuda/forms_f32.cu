#include "cuda/generic.cuh"
#include "cuda/lanes.cuh"
#include "cuda/sequential.cuh"
#include "cuda/states.cuh"

namespace vim::cuda {
template cudaError_t LaunchGeneric<float>(const Params&, cudaStream_t);
template cudaError_t LaunchLanes<float>(const Params&, const vim_scan_variant&, cudaStream_t);
template cudaError_t LaunchSequential<float>(const Params&, int, cudaStream_t);
template cudaError_t LaunchStates<float>(const Params&, const vim_scan_variant&, int, cudaStream_t);
}  // namespace vim::cuda
