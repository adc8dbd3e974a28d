#include "plugin_v3.h"

#include <algorithm>
#include <exception>

#include "logging.h"

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;

constexpr int32_t kFailure = -1;

// Checks inputs of the largest shapes that will come.
bool BindLargest(const Op& op, const Attribute* attributes, const DynamicPluginTensorDesc* in, int32_t count,
                 Call* call, std::string* error) {
  Tensor tensors[kMaxInputs] = {};
  for (int32_t i = 0; i < count && i < kMaxInputs; ++i) tensors[i] = {in[i].max, in[i].desc.type};
  return Bind(op, attributes, tensors, count, call, error);
}

}  // namespace

Plugin::Plugin(const Op& op, const std::string& layer, const Attribute* attributes)
    : op_(op), layer_(layer), attributes_{}, timing_cache_id_(AttributesText(op, attributes)) {
  std::copy_n(attributes, op.attribute_count, attributes_.begin());
  for (int32_t i = 0; i < op.attribute_count; ++i) fields_[i] = FieldOf(op.attributes[i], &attributes_[i]);
  field_collection_ = {op.attribute_count, fields_.data()};
}

int32_t Plugin::Refuse(const std::string& why) const noexcept {
  LogError(op_.name, layer_, why);
  return kFailure;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
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

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  try {
    return new Plugin(op_, layer_, attributes_.data());
  } catch (const std::exception& error) {
    LogError(op_.name, layer_, error.what());
    return nullptr;
  }
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t in_count,
                                const DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept {
  std::string error;
  Call call;
  return BindLargest(op_, attributes_.data(), in, in_count, &call, &error) ? 0 : Refuse(error);
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t in_count,
                                       int32_t out_count) noexcept {
  std::string error;
  if (!CountsPass(op_, in_count, out_count, &error)) {
    Refuse(error);
    return false;
  }
  nvinfer1::PluginTensorDesc descs[kMaxInputs + kMaxOutputs];
  for (int32_t i = 0; i <= position; ++i) descs[i] = tensors[i].desc;
  return SupportsFormat(op_, descs, position, in_count);
}

int32_t Plugin::getOutputDataTypes(DataType* out, int32_t out_count, const DataType* in,
                                   int32_t in_count) const noexcept {
  std::string error;
  if (!CountsPass(op_, in_count, out_count, &error)) return Refuse(error);
  for (int32_t i = 0; i < out_count; ++i) out[i] = OutputType(op_, i, in[0]);
  return 0;
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t in_count, const nvinfer1::DimsExprs* /*shapes*/,
                                int32_t /*shape_count*/, nvinfer1::DimsExprs* out, int32_t out_count,
                                nvinfer1::IExprBuilder& /*builder*/) noexcept {
  std::string error;
  if (!CountsPass(op_, in_count, out_count, &error)) return Refuse(error);
  for (int32_t i = 0; i < out_count; ++i)
    if (!OutputShape(op_, i, in, &out[i], &error)) return Refuse(error);
  return 0;
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t in_count,
                                const DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) const noexcept {
  std::string error;
  Call call;
  return BindLargest(op_, attributes_.data(), in, in_count, &call, &error) ? op_.workspace(call) : 0;
}

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t in_count,
                              const nvinfer1::PluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept {
  Tensor tensors[kMaxInputs] = {};
  for (int32_t i = 0; i < in_count && i < kMaxInputs; ++i) tensors[i] = {in[i].dims, in[i].type};
  std::string error;
  Call call;
  if (!Bind(op_, attributes_.data(), tensors, in_count, &call, &error)) return Refuse(error);
  input_count_ = in_count;
  return 0;
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* in_desc, const nvinfer1::PluginTensorDesc* /*out_desc*/,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  std::string error;
  return Enqueue(op_, attributes_.data(), in_desc, input_count_, inputs, outputs, workspace, stream, &error)
             ? 0
             : Refuse(error);
}

// Each context has its own shapes, so its own plugin.
nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept { return clone(); }

Creator::Creator(const Op& op) : op_(op) {
  for (int32_t i = 0; i < op.attribute_count; ++i) fields_[i] = FieldOf(op.attributes[i], nullptr);
  field_collection_ = {op.attribute_count, fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase /*phase*/) noexcept {
  try {
    const std::string layer = name == nullptr ? "" : name;
    Attribute attributes[kMaxAttributes] = {};
    std::string error;
    if (ReadFields(op_, fields, attributes, &error)) return new Plugin(op_, layer, attributes);
    LogError(op_.name, layer, error);
  } catch (const std::exception& error) {
    LogError(op_.name, "", error.what());
  }
  return nullptr;
}

}  // namespace vim::trt
