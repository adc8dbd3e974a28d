// Any op of kOps as an IPluginV3, for TensorRT 10 and 11. All tensors linear, types as the op's rules say.
#ifndef VIMDEPLOY_PLUGINS_TENSORRT_PLUGIN_V3_H_
#define VIMDEPLOY_PLUGINS_TENSORRT_PLUGIN_V3_H_

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "op.h"

namespace vim::trt {

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Op& op, const std::string& layer, const Attribute* attributes);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return op_.output_count; }
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t out_count) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t in_count,
                                 int32_t out_count) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t out_count, const nvinfer1::DataType* in,
                             int32_t in_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t in_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t out_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t out_count) const noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_cache_id_.c_str(); }
  int32_t getFormatCombinationLimit() noexcept override { return 3; }  // fp32, fp16, bf16

  // IPluginV3OneRuntime
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t in_count, const nvinfer1::PluginTensorDesc* out,
                        int32_t out_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in_desc, const nvinfer1::PluginTensorDesc* out_desc,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &field_collection_; }

 private:
  // Says why, and fails.
  int32_t Refuse(const std::string& why) const noexcept;

  const Op& op_;
  std::string layer_;
  std::array<Attribute, kMaxAttributes> attributes_;
  std::string timing_cache_id_;
  int32_t input_count_ = 0;  // set by onShapeChange; enqueue is not told
  std::array<nvinfer1::PluginField, kMaxAttributes> fields_;
  nvinfer1::PluginFieldCollection field_collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const Op& op);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &field_collection_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  const Op& op_;
  std::array<nvinfer1::PluginField, kMaxAttributes> fields_;
  nvinfer1::PluginFieldCollection field_collection_;
};

}  // namespace vim::trt

#endif  // VIMDEPLOY_PLUGINS_TENSORRT_PLUGIN_V3_H_
