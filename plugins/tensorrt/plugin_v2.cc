// Any op of kOps as an IPluginV2DynamicExt, which is what TensorRT 8.5 and 8.6 know. Loading the library registers the
// creators, in namespace vim.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "logging.h"
#include "op.h"

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;

nvinfer1::IPluginRegistry* registry = nullptr;

class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  Plugin(const Op& op, const std::string& layer, const Attribute* attributes) : op_(op), layer_(layer), attributes_{} {
    std::copy_n(attributes, op.attribute_count, attributes_.begin());
  }

  // What a plan keeps of a layer: each attribute, then the number of inputs.
  static size_t SerialSize(const Op& op) { return op.attribute_count * sizeof(Attribute) + sizeof(int32_t); }
  static Plugin* Deserialize(const Op& op, const std::string& layer, const void* data) {
    Attribute attributes[kMaxAttributes] = {};
    const size_t size = op.attribute_count * sizeof(Attribute);
    std::memcpy(attributes, data, size);
    auto* plugin = new Plugin(op, layer, attributes);
    std::memcpy(&plugin->input_count_, static_cast<const char*>(data) + size, sizeof(int32_t));
    return plugin;
  }

  // IPluginV2
  const char* getPluginType() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  void setPluginNamespace(const char* space) noexcept override { namespace_ = space; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  int32_t getNbOutputs() const noexcept override { return op_.output_count; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  size_t getSerializationSize() const noexcept override { return SerialSize(op_); }
  void serialize(void* buffer) const noexcept override {
    const size_t size = op_.attribute_count * sizeof(Attribute);
    std::memcpy(buffer, attributes_.data(), size);
    std::memcpy(static_cast<char*>(buffer) + size, &input_count_, sizeof(input_count_));
  }

  // IPluginV2Ext
  DataType getOutputDataType(int32_t index, const DataType* in, int32_t /*in_count*/) const noexcept override {
    return OutputType(op_, index, in[0]);
  }

  // IPluginV2DynamicExt
  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new Plugin(*this);
    } catch (const std::exception& error) {
      LogError(op_.name, layer_, error.what());
      return nullptr;
    }
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* in, int32_t in_count,
                                          nvinfer1::IExprBuilder& /*builder*/) noexcept override {
    std::string error;
    nvinfer1::DimsExprs shape = {};
    // This interface cannot refuse here. Without dimensions the builder stops at the next layer.
    if (!CountsPass(op_, in_count, op_.output_count, &error) || !OutputShape(op_, index, in, &shape, &error)) {
      LogError(op_.name, layer_, error);
      shape.nbDims = -1;
    }
    return shape;
  }
  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t in_count,
                                 int32_t out_count) noexcept override {
    std::string error;
    if (CountsPass(op_, in_count, out_count, &error)) return SupportsFormat(op_, tensors, position, in_count);
    LogError(op_.name, layer_, error);
    return false;
  }
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t in_count,
                       const nvinfer1::DynamicPluginTensorDesc* /*out*/, int32_t /*out_count*/) noexcept override {
    input_count_ = in_count;
    Tensor tensors[kMaxInputs] = {};
    for (int32_t i = 0; i < in_count && i < kMaxInputs; ++i) tensors[i] = {in[i].max, in[i].desc.type};
    std::string error;
    Call call;
    // This interface cannot refuse here; enqueue will, with the same words.
    if (!Bind(op_, attributes_.data(), tensors, in_count, &call, &error)) LogError(op_.name, layer_, error);
  }
  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* in, int32_t in_count,
                          const nvinfer1::PluginTensorDesc* /*out*/, int32_t /*out_count*/) const noexcept override {
    Tensor tensors[kMaxInputs] = {};
    for (int32_t i = 0; i < in_count && i < kMaxInputs; ++i) tensors[i] = {in[i].dims, in[i].type};
    std::string error;
    Call call;
    return Bind(op_, attributes_.data(), tensors, in_count, &call, &error) ? op_.workspace(call) : 0;
  }
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in_desc, const nvinfer1::PluginTensorDesc* /*out_desc*/,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    std::string error;
    if (Enqueue(op_, attributes_.data(), in_desc, input_count_, inputs, outputs, workspace, stream, &error)) return 0;
    LogError(op_.name, layer_, error);
    return 1;
  }

 private:
  const Op& op_;
  std::string layer_, namespace_ = kPluginNamespace;
  std::array<Attribute, kMaxAttributes> attributes_;
  int32_t input_count_ = 0;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  explicit Creator(const Op& op) : op_(op) {
    for (int32_t i = 0; i < op.attribute_count; ++i) fields_[i] = FieldOf(op.attributes[i], nullptr);
    field_collection_ = {op.attribute_count, fields_.data()};
  }

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  void setPluginNamespace(const char* /*space*/) noexcept override {}
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &field_collection_; }

  nvinfer1::IPluginV2* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
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

  nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* data, size_t size) noexcept override {
    try {
      const std::string layer = name == nullptr ? "" : name;
      if (size == Plugin::SerialSize(op_)) return Plugin::Deserialize(op_, layer, data);
      LogError(op_.name, layer,
               "the plan holds " + std::to_string(size) + " bytes for this layer, not " +
                   std::to_string(Plugin::SerialSize(op_)) + "; it was built by another version of the library");
    } catch (const std::exception& error) {
      LogError(op_.name, "", error.what());
    }
    return nullptr;
  }

 private:
  const Op& op_;
  std::array<PluginField, kMaxAttributes> fields_;
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
      LogError(kOps[0].name, "", "no TensorRT 8 is loaded in this process; load it first, then this library");
      return;
    }
    static Creator creators[] = {Creator(kOps[0]), Creator(kOps[1]), Creator(kOps[2]), Creator(kOps[3])};
    static_assert(sizeof(creators) / sizeof(creators[0]) == kOpCount, "one creator an op");
    for (Creator& creator : creators)
      if (registry->getPluginCreator(creator.getPluginName(), kPluginVersion, kPluginNamespace) == nullptr)
        registry->registerCreator(creator, kPluginNamespace);
  }
} registrar;

}  // namespace

void LogError(const char* op, const std::string& layer, const std::string& text) noexcept {
  try {
    const std::string line = std::string("vim::") + op + " '" + layer + "': " + text;
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
