// vim::SelectiveScan as an IPluginV3, for TensorRT 10 and 11. Inputs u, delta, A, B, C and, where the graph has them,
// D, z, delta_bias; one output, shaped and typed like u. All linear; u, delta, B, C, z, y in one of fp32, fp16, bf16;
// A, D, delta_bias in fp32.
#ifndef VIMDEPLOY_PLUGINS_TENSORRT_SELECTIVE_SCAN_V3_H_
#define VIMDEPLOY_PLUGINS_TENSORRT_SELECTIVE_SCAN_V3_H_

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "scan_inputs.h"

namespace vim::trt {

class SelectiveScan final : public nvinfer1::IPluginV3,
                            public nvinfer1::IPluginV3OneCore,
                            public nvinfer1::IPluginV3OneBuild,
                            public nvinfer1::IPluginV3OneRuntime {
 public:
  SelectiveScan(const std::string& layer, const Attributes& attributes);
  SelectiveScan(const SelectiveScan& other) : SelectiveScan(other.layer_, other.attributes_) {}

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }
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
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  std::string layer_;
  Attributes attributes_;
  std::string timing_cache_id_;
  int32_t input_count_ = 0;  // set by onShapeChange; enqueue is not told
  std::array<nvinfer1::PluginField, 2> fields_;
  nvinfer1::PluginFieldCollection field_collection_;
};

class SelectiveScanCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  SelectiveScanCreator();

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &field_collection_; }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  std::array<nvinfer1::PluginField, 2> fields_;
  nvinfer1::PluginFieldCollection field_collection_;
};

}  // namespace vim::trt

#endif  // VIMDEPLOY_PLUGINS_TENSORRT_SELECTIVE_SCAN_V3_H_
