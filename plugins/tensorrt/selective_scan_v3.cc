#include "selective_scan_v3.h"

#include <exception>
#include <new>

#include "logging.h"

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kFailure = -1;

// Checks inputs of the largest shapes that will come.
bool DescribeLargest(const Attributes& attributes, const DynamicPluginTensorDesc* in, int32_t count,
                     vim_selective_scan_desc* desc, std::string* error) {
  Dims dims[kMaxInputs];
  DataType types[kMaxInputs];
  for (int32_t i = 0; i < count && i < kMaxInputs; ++i) {
    dims[i] = in[i].max;
    types[i] = in[i].desc.type;
  }
  Positions positions;
  return Describe(attributes, dims, types, count, desc, &positions, error);
}

}  // namespace

SelectiveScan::SelectiveScan(const std::string& layer, const Attributes& attributes)
    : layer_(layer),
      attributes_(attributes),
      timing_cache_id_("delta_softplus=" + std::to_string(attributes.delta_softplus) +
                       ",reverse=" + std::to_string(attributes.reverse)),
      fields_{PluginField("delta_softplus", &attributes_.delta_softplus, PluginFieldType::kINT32, 1),
              PluginField("reverse", &attributes_.reverse, PluginFieldType::kINT32, 1)},
      field_collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginCapability* SelectiveScan::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* SelectiveScan::clone() noexcept {
  try {
    return new SelectiveScan(*this);
  } catch (const std::exception& error) {
    LogError(layer_, error.what());
    return nullptr;
  }
}

int32_t SelectiveScan::configurePlugin(const DynamicPluginTensorDesc* in, int32_t in_count,
                                       const DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept {
  std::string error;
  vim_selective_scan_desc desc;
  if (DescribeLargest(attributes_, in, in_count, &desc, &error)) return 0;
  LogError(layer_, error);
  return kFailure;
}

bool SelectiveScan::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                              int32_t in_count, int32_t out_count) noexcept {
  if (in_count < 5 || in_count > kMaxInputs || out_count != 1 || position > in_count) {
    LogError(layer_, std::to_string(in_count) + " inputs and " + std::to_string(out_count) +
                         " outputs; there must be 5 to 8 inputs and 1 output");
    return false;
  }
  nvinfer1::PluginTensorDesc descs[kMaxInputs + 1];
  for (int32_t i = 0; i <= position; ++i) descs[i] = tensors[i].desc;
  return SupportsFormat(descs, position, in_count);
}

int32_t SelectiveScan::getOutputDataTypes(DataType* out, int32_t out_count, const DataType* in,
                                          int32_t in_count) const noexcept {
  if (out_count != 1 || in_count < 5) return kFailure;
  out[0] = in[kU];
  return 0;
}

int32_t SelectiveScan::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t in_count,
                                       const nvinfer1::DimsExprs* /*shapes*/, int32_t /*shape_count*/,
                                       nvinfer1::DimsExprs* out, int32_t out_count,
                                       nvinfer1::IExprBuilder& /*builder*/) noexcept {
  if (out_count != 1 || in_count < 5) return kFailure;
  if (in[kU].nbDims != 3) {
    LogError(layer_, "u has " + std::to_string(in[kU].nbDims) + " dimensions; it must be (batch, length, channels)");
    return kFailure;
  }
  out[0] = in[kU];
  return 0;
}

size_t SelectiveScan::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t in_count,
                                       const DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) const noexcept {
  std::string error;
  vim_selective_scan_desc desc;
  return DescribeLargest(attributes_, in, in_count, &desc, &error) ? vim_selective_scan_cuda_workspace(&desc) : 0;
}

int32_t SelectiveScan::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t in_count,
                                     const nvinfer1::PluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept {
  Dims dims[kMaxInputs];
  DataType types[kMaxInputs];
  for (int32_t i = 0; i < in_count && i < kMaxInputs; ++i) {
    dims[i] = in[i].dims;
    types[i] = in[i].type;
  }
  std::string error;
  vim_selective_scan_desc desc;
  Positions positions;
  if (!Describe(attributes_, dims, types, in_count, &desc, &positions, &error)) {
    LogError(layer_, error);
    return kFailure;
  }
  input_count_ = in_count;
  return 0;
}

int32_t SelectiveScan::enqueue(const nvinfer1::PluginTensorDesc* in_desc,
                               const nvinfer1::PluginTensorDesc* /*out_desc*/, const void* const* inputs,
                               void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  std::string error;
  if (Enqueue(attributes_, in_desc, input_count_, inputs, outputs, workspace, stream, &error)) return 0;
  LogError(layer_, error);
  return kFailure;
}

// Each context has its own shapes, so its own plugin.
nvinfer1::IPluginV3* SelectiveScan::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* SelectiveScan::getFieldsToSerialize() noexcept { return &field_collection_; }

SelectiveScanCreator::SelectiveScanCreator()
    : fields_{PluginField("delta_softplus", nullptr, PluginFieldType::kINT32, 1),
              PluginField("reverse", nullptr, PluginFieldType::kINT32, 1)},
      field_collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* SelectiveScanCreator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                                        nvinfer1::TensorRTPhase /*phase*/) noexcept {
  try {
    const std::string layer = name == nullptr ? "" : name;
    Attributes attributes;
    std::string error;
    if (ReadFields(fields, &attributes, &error)) return new SelectiveScan(layer, attributes);
    LogError(layer, error);
  } catch (const std::exception& error) {
    LogError("", error.what());
  }
  return nullptr;
}

}  // namespace vim::trt
