// vim::SelectiveScan for TensorRT 8.5 and 8.6, which know IPluginV2DynamicExt only. The same contract as
// selective_scan_v3.h. Loading the library registers the creator, in namespace vim.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "logging.h"
#include "scan_inputs.h"

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

nvinfer1::IPluginRegistry* registry = nullptr;

class SelectiveScan final : public nvinfer1::IPluginV2DynamicExt {
 public:
  SelectiveScan(const std::string& layer, const Attributes& attributes) : layer_(layer), attributes_(attributes) {}

  // IPluginV2
  const char* getPluginType() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  void setPluginNamespace(const char* space) noexcept override { namespace_ = space; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  size_t getSerializationSize() const noexcept override { return sizeof(Attributes) + sizeof(input_count_); }
  void serialize(void* buffer) const noexcept override {
    std::memcpy(buffer, &attributes_, sizeof(Attributes));
    std::memcpy(static_cast<char*>(buffer) + sizeof(Attributes), &input_count_, sizeof(input_count_));
  }

  // IPluginV2Ext
  DataType getOutputDataType(int32_t /*index*/, const DataType* in, int32_t /*in_count*/) const noexcept override {
    return in[kU];
  }

  // IPluginV2DynamicExt
  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new SelectiveScan(*this);
    } catch (const std::exception& error) {
      LogError(layer_, error.what());
      return nullptr;
    }
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t /*index*/, const nvinfer1::DimsExprs* in, int32_t /*in_count*/,
                                          nvinfer1::IExprBuilder& /*builder*/) noexcept override {
    return in[kU];
  }
  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t in_count,
                                 int32_t out_count) noexcept override {
    return in_count >= 5 && in_count <= kMaxInputs && out_count == 1 && SupportsFormat(tensors, position, in_count);
  }
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                       const nvinfer1::DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept override {
    input_count_ = in_count;
    Dims dims[kMaxInputs];
    DataType types[kMaxInputs];
    for (int32_t i = 0; i < in_count && i < kMaxInputs; ++i) {
      dims[i] = in[i].max;
      types[i] = in[i].desc.type;
    }
    std::string error;
    vim_selective_scan_desc desc;
    Positions positions;
    // This interface cannot refuse here; enqueue will, with the same words.
    if (!Describe(attributes_, dims, types, in_count, &desc, &positions, &error)) LogError(layer_, error);
  }
  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* /*in*/, int32_t /*in_count*/,
                          const nvinfer1::PluginTensorDesc* /*out*/, int32_t /*out_count*/) const noexcept override {
    const vim_selective_scan_desc desc = {};
    return vim_selective_scan_cuda_workspace(&desc);
  }
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in_desc, const nvinfer1::PluginTensorDesc* /*out_desc*/,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    std::string error;
    if (Enqueue(attributes_, in_desc, input_count_, inputs, outputs, workspace, stream, &error)) return 0;
    LogError(layer_, error);
    return 1;
  }

  int32_t input_count_ = 0;

 private:
  std::string layer_, namespace_ = kPluginNamespace;
  Attributes attributes_;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  Creator()
      : fields_{PluginField("delta_softplus", nullptr, PluginFieldType::kINT32, 1),
                PluginField("reverse", nullptr, PluginFieldType::kINT32, 1)},
        field_collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  void setPluginNamespace(const char* /*space*/) noexcept override {}
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &field_collection_; }

  nvinfer1::IPluginV2* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
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

  nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* data, size_t size) noexcept override {
    try {
      const std::string layer = name == nullptr ? "" : name;
      Attributes attributes;
      int32_t input_count;
      if (size != sizeof(attributes) + sizeof(input_count)) {
        LogError(layer, "the plan holds " + std::to_string(size) +
                            " bytes for this layer; it was built by another "
                            "version of the library");
        return nullptr;
      }
      std::memcpy(&attributes, data, sizeof(attributes));
      std::memcpy(&input_count, static_cast<const char*>(data) + sizeof(attributes), sizeof(input_count));
      auto* plugin = new SelectiveScan(layer, attributes);
      plugin->input_count_ = input_count;
      return plugin;
    } catch (const std::exception& error) {
      LogError("", error.what());
      return nullptr;
    }
  }

 private:
  std::array<PluginField, 2> fields_;
  nvinfer1::PluginFieldCollection field_collection_;
};

// The registry of the TensorRT that the process has loaded; found by name, so that this library has no undefined symbol
// of TensorRT's and says what is wrong instead of failing to load.
struct Registrar {
  Registrar() {
    using GetRegistry = nvinfer1::IPluginRegistry* (*)();
    auto get = reinterpret_cast<GetRegistry>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    if (get == nullptr) {
      if (void* library = dlopen("libnvinfer.so.8", RTLD_LAZY | RTLD_NOLOAD))
        get = reinterpret_cast<GetRegistry>(dlsym(library, "getPluginRegistry"));
    }
    registry = get == nullptr ? nullptr : get();
    if (registry == nullptr) {
      LogError("", "no TensorRT 8 is loaded in this process; load it first, then this library");
      return;
    }
    static Creator creator;
    if (registry->getPluginCreator(kPluginName, kPluginVersion, kPluginNamespace) == nullptr)
      registry->registerCreator(creator, kPluginNamespace);
  }
} registrar;

}  // namespace

void LogError(const std::string& layer, const std::string& text) noexcept {
  try {
    const std::string line = std::string("vim::SelectiveScan '") + layer + "': " + text;
    // Only with a registry is there a TensorRT whose logger may be asked for.
    using GetLogger = nvinfer1::ILogger* (*)();
    const auto get = registry == nullptr ? nullptr : reinterpret_cast<GetLogger>(dlsym(RTLD_DEFAULT, "getLogger"));
    nvinfer1::ILogger* const logger = get == nullptr ? nullptr : get();
    if (logger != nullptr)
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    else
      std::fprintf(stderr, "%s\n", line.c_str());
  } catch (...) {  // out of memory while reporting: the status still tells
  }
}

}  // namespace vim::trt
