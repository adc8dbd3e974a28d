// From TensorRT's shapes, types and fields to the kernels' descriptor: what both adapters share. Compiled once against
// the headers of each. No arithmetic, no state.
#ifndef VIMDEPLOY_PLUGINS_TENSORRT_SCAN_INPUTS_H_
#define VIMDEPLOY_PLUGINS_TENSORRT_SCAN_INPUTS_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "vim/selective_scan_cuda.h"

namespace vim::trt {

constexpr char kPluginName[] = "SelectiveScan";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "vim";

// The attributes of vim::SelectiveScan, which are the plugin's fields.
struct Attributes {
  int32_t delta_softplus = 1;
  int32_t reverse = 0;
};

// Reads `fields` into `attributes`. False, and why in `error`, when one is of a wrong type or value. Fields that the
// parser keeps for itself (plugin_namespace, plugin_version) are skipped; others are refused by name.
bool ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes* attributes, std::string* error);

// Where each input of the op is among the plugin's inputs; -1 where it is absent. u, delta, A, B, C are 0 to 4. Absent
// optional inputs are not passed on by parsers, so the ranks of what follows tell D, z and delta_bias apart.
enum Input : int32_t { kU, kDelta, kA, kB, kC };
struct Positions {
  int32_t D = -1, z = -1, delta_bias = -1;
};
bool FindOptionalInputs(const nvinfer1::Dims* dims, int32_t count, Positions* positions, std::string* error);

// Fills `desc` for contiguous inputs of these shapes and types, with every check that the op's contract asks for, and
// asks vim_selective_scan_supports. `dims` and `types` have `count` entries; a dimension of -1 (not known yet) passes.
bool Describe(const Attributes& attributes, const nvinfer1::Dims* dims, const nvinfer1::DataType* types, int32_t count,
              vim_selective_scan_desc* desc, Positions* positions, std::string* error);

// Whether the tensor at `position` (inputs, then the output) may have this type and format, given those before it.
bool SupportsFormat(const nvinfer1::PluginTensorDesc* tensors, int32_t position, int32_t input_count);

// Enqueues the scan. False, and why in `error`, when the kernels refuse.
bool Enqueue(const Attributes& attributes, const nvinfer1::PluginTensorDesc* input_desc, int32_t input_count,
             const void* const* inputs, void* const* outputs, void* workspace, void* stream, std::string* error);

constexpr int32_t kMaxInputs = 8;

}  // namespace vim::trt

#endif  // VIMDEPLOY_PLUGINS_TENSORRT_SCAN_INPUTS_H_
