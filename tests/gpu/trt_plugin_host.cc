// Drives the TensorRT plugins as TensorRT would, without TensorRT: finds the creators in the library, creates each op's
// plugin, asks it everything a builder asks, and with --gpu also runs it on a card from two contexts in two threads and
// compares with trt_plugin_cases.h.
//
//   trt_plugin_host LIBRARY [--gpu]      LIBRARY: libvimdeploy_trt.so, or with TensorRT 8.5's headers
//   libvimdeploy_trt8.so
//
// Prints one line a check; exit code 1 when one fails.
#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "trt_plugin_cases.h"

namespace {

using namespace nvinfer1;

constexpr auto kBf16 = static_cast<DataType>(7);  // 8.5 has no name for it
constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, kBf16};
constexpr const char* kTypeNames[] = {"fp32", "fp16", "bf16"};

int checks = 0, failures = 0;

void Check(bool passed, const std::string& what) {
  ++checks;
  failures += !passed;
  std::printf("%s %s\n", passed ? "ok    " : "FAILED", what.c_str());
}

class Logger : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    last = text;
  }
  std::string last;

 private:
  std::mutex mutex_;
} logger;

bool Logged(const std::string& part) {
  const bool found = logger.last.find(part) != std::string::npos;
  if (!found) std::printf("       logged instead: %s\n", logger.last.c_str());
  logger.last.clear();
  return found;
}

// A plugin of either interface.
class Layer {
 public:
  virtual ~Layer() = default;
  virtual std::string Identity() = 0;  // name, version, namespace
  virtual int OutputCount() = 0;
  virtual bool Format(int position, const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) = 0;
  // Whether the inputs were taken: refused with a status (V3), or with a line in the log (V2).
  virtual bool Configure(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) = 0;
  virtual std::vector<DataType> Types(const std::vector<DataType>& inputs) = 0;
  virtual std::vector<DimsExprs> Shapes(const std::vector<DimsExprs>& inputs) = 0;
  virtual std::string Attributes() = 0;
  virtual std::unique_ptr<Layer> Clone() = 0;
  virtual std::unique_ptr<Layer> Reloaded() = 0;  // from what a plan keeps of it
  virtual std::unique_ptr<Layer> Attached() = 0;  // to a context of its own
  virtual size_t Workspace(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) = 0;
  virtual int Enqueue(const std::vector<PluginTensorDesc>& tensors, int inputs, void* const* pointers, void* workspace,
                      cudaStream_t stream) = 0;
};

PluginFieldCollection CollectionOf(const std::vector<PluginField>& fields) {
  return {static_cast<int32_t>(fields.size()), fields.data()};
}

#if NV_TENSORRT_MAJOR >= 10

class LayerV3 : public Layer {
 public:
  LayerV3(IPluginCreatorV3One* creator, IPluginV3* plugin)
      : creator_(creator),
        plugin_(plugin),
        core_(As<IPluginV3OneCore>(PluginCapabilityType::kCORE)),
        build_(As<IPluginV3OneBuild>(PluginCapabilityType::kBUILD)),
        runtime_(As<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME)) {}

  std::string Identity() override {
    return std::string(core_->getPluginName()) + " " + core_->getPluginVersion() + " " + core_->getPluginNamespace();
  }
  int OutputCount() override { return build_->getNbOutputs(); }
  bool Format(int position, const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    return build_->supportsFormatCombination(position, tensors.data(), inputs,
                                             static_cast<int>(tensors.size()) - inputs);
  }
  bool Configure(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    return build_->configurePlugin(tensors.data(), inputs, &tensors[inputs],
                                   static_cast<int>(tensors.size()) - inputs) == 0;
  }
  std::vector<DataType> Types(const std::vector<DataType>& inputs) override {
    std::vector<DataType> types(OutputCount());
    const int count = static_cast<int>(inputs.size());
    if (build_->getOutputDataTypes(types.data(), OutputCount(), inputs.data(), count) != 0) types.clear();
    return types;
  }
  std::vector<DimsExprs> Shapes(const std::vector<DimsExprs>& inputs) override {
    std::vector<DimsExprs> shapes(OutputCount());
    alignas(8) char builder[64] = {};  // not called
    if (build_->getOutputShapes(inputs.data(), static_cast<int>(inputs.size()), nullptr, 0, shapes.data(),
                                OutputCount(), *reinterpret_cast<IExprBuilder*>(builder)) != 0)
      shapes.clear();
    return shapes;
  }
  std::string Attributes() override { return build_->getTimingCacheID(); }
  std::unique_ptr<Layer> Clone() override { return Made(plugin_->clone()); }
  std::unique_ptr<Layer> Reloaded() override {
    return Made(creator_->createPlugin("layer", runtime_->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  }
  std::unique_ptr<Layer> Attached() override { return Made(runtime_->attachToContext(nullptr)); }
  size_t Workspace(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    return build_->getWorkspaceSize(tensors.data(), inputs, &tensors[inputs],
                                    static_cast<int>(tensors.size()) - inputs);
  }
  int Enqueue(const std::vector<PluginTensorDesc>& tensors, int inputs, void* const* pointers, void* workspace,
              cudaStream_t stream) override {
    const int outputs = static_cast<int>(tensors.size()) - inputs;
    const int32_t status = runtime_->onShapeChange(tensors.data(), inputs, &tensors[inputs], outputs);
    if (status != 0) return status;
    return runtime_->enqueue(tensors.data(), &tensors[inputs], pointers, pointers + inputs, workspace, stream);
  }

 private:
  template <typename T>
  T* As(PluginCapabilityType type) {
    return static_cast<T*>(plugin_->getCapabilityInterface(type));
  }
  std::unique_ptr<Layer> Made(IPluginV3* plugin) {
    return plugin == nullptr ? nullptr : std::make_unique<LayerV3>(creator_, plugin);
  }

  IPluginCreatorV3One* creator_;
  std::unique_ptr<IPluginV3> plugin_;
  IPluginV3OneCore* core_;
  IPluginV3OneBuild* build_;
  IPluginV3OneRuntime* runtime_;
};

class Finder : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
} finder;

std::map<std::string, IPluginCreatorV3One*> creators;

bool Load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::printf("%s\n", dlerror()), false;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  const auto get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  const auto set = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) return false;
  set(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = get(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const each = static_cast<IPluginCreatorV3One*>(all[i]);
    creators[each->getPluginName()] = each;
  }
  return true;
}

std::unique_ptr<Layer> Create(const std::string& op, const std::vector<PluginField>& fields) {
  const PluginFieldCollection collection = CollectionOf(fields);
  IPluginV3* const plugin = creators[op]->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
  return plugin == nullptr ? nullptr : std::make_unique<LayerV3>(creators[op], plugin);
}

#else

class LayerV2 : public Layer {
 public:
  LayerV2(IPluginCreator* creator, IPluginV2DynamicExt* plugin) : creator_(creator), plugin_(plugin) {}
  ~LayerV2() override { plugin_->destroy(); }

  std::string Identity() override {
    return std::string(plugin_->getPluginType()) + " " + plugin_->getPluginVersion() + " " +
           plugin_->getPluginNamespace();
  }
  int OutputCount() override { return plugin_->getNbOutputs(); }
  bool Format(int position, const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    std::vector<PluginTensorDesc> descs;
    for (const auto& each : tensors) descs.push_back(each.desc);
    return plugin_->supportsFormatCombination(position, descs.data(), inputs,
                                              static_cast<int>(tensors.size()) - inputs);
  }
  bool Configure(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    logger.last.clear();
    plugin_->configurePlugin(tensors.data(), inputs, &tensors[inputs], static_cast<int>(tensors.size()) - inputs);
    return logger.last.empty();
  }
  std::vector<DataType> Types(const std::vector<DataType>& inputs) override {
    std::vector<DataType> types;
    for (int i = 0; i < OutputCount(); ++i)
      types.push_back(plugin_->getOutputDataType(i, inputs.data(), static_cast<int>(inputs.size())));
    return types;
  }
  std::vector<DimsExprs> Shapes(const std::vector<DimsExprs>& inputs) override {
    std::vector<DimsExprs> shapes;
    alignas(8) char builder[64] = {};  // not called
    for (int i = 0; i < OutputCount(); ++i) {
      shapes.push_back(plugin_->getOutputDimensions(i, inputs.data(), static_cast<int>(inputs.size()),
                                                    *reinterpret_cast<IExprBuilder*>(builder)));
      if (shapes.back().nbDims < 0) return {};
    }
    return shapes;
  }
  std::string Attributes() override {  // by what is serialised: 4 bytes each, then the number of inputs
    std::vector<char> bytes(plugin_->getSerializationSize());
    plugin_->serialize(bytes.data());
    std::string text;
    const PluginFieldCollection& fields = *creator_->getFieldNames();
    for (int32_t i = 0; i < fields.nbFields; ++i) {
      char value[32];
      if (fields.fields[i].type == PluginFieldType::kFLOAT32) {
        float number;
        std::memcpy(&number, &bytes[i * 4], 4);
        std::snprintf(value, sizeof value, "%g", number);
      } else {
        int32_t flag;
        std::memcpy(&flag, &bytes[i * 4], 4);
        std::snprintf(value, sizeof value, "%d", flag);
      }
      text += (i ? "," : "") + std::string(fields.fields[i].name) + "=" + value;
    }
    return text;
  }
  std::unique_ptr<Layer> Clone() override { return Made(plugin_->clone()); }
  std::unique_ptr<Layer> Reloaded() override {
    std::vector<char> bytes(plugin_->getSerializationSize());
    plugin_->serialize(bytes.data());
    return Made(creator_->deserializePlugin("layer", bytes.data(), bytes.size()));
  }
  std::unique_ptr<Layer> Attached() override { return Clone(); }
  size_t Workspace(const std::vector<DynamicPluginTensorDesc>& tensors, int inputs) override {
    std::vector<PluginTensorDesc> descs;
    for (const DynamicPluginTensorDesc& tensor : tensors) {
      descs.push_back(tensor.desc);
      descs.back().dims = tensor.max;
    }
    return plugin_->getWorkspaceSize(descs.data(), inputs, &descs[inputs], static_cast<int>(descs.size()) - inputs);
  }
  int Enqueue(const std::vector<PluginTensorDesc>& tensors, int inputs, void* const* pointers, void* workspace,
              cudaStream_t stream) override {
    return plugin_->enqueue(tensors.data(), &tensors[inputs], pointers, pointers + inputs, workspace, stream);
  }

 private:
  std::unique_ptr<Layer> Made(IPluginV2* plugin) {
    return plugin == nullptr ? nullptr : std::make_unique<LayerV2>(creator_, static_cast<IPluginV2DynamicExt*>(plugin));
  }

  IPluginCreator* creator_;
  IPluginV2DynamicExt* plugin_;
};

std::map<std::string, IPluginCreator*> creators;

class Registry : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreator& creator, const AsciiChar* space) noexcept override {
    if (std::string(space) != "vim" || creators.count(creator.getPluginName()) != 0) return false;
    creators[creator.getPluginName()] = &creator;
    return true;
  }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const AsciiChar* name, const AsciiChar*, const AsciiChar*) noexcept override {
    const auto found = creators.find(name);
    return found == creators.end() ? nullptr : found->second;
  }
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
};

bool Load(const char* path) {
  if (dlopen(path, RTLD_NOW | RTLD_LOCAL) == nullptr) return std::printf("%s\n", dlerror()), false;
  return true;
}

std::unique_ptr<Layer> Create(const std::string& op, const std::vector<PluginField>& fields) {
  const PluginFieldCollection collection = CollectionOf(fields);
  IPluginV2* const plugin = creators[op]->createPlugin("layer", &collection);
  return plugin == nullptr ? nullptr
                           : std::make_unique<LayerV2>(creators[op], static_cast<IPluginV2DynamicExt*>(plugin));
}

#endif

std::vector<PluginField> FieldsOf(const Case& each) {
  std::vector<PluginField> fields;
  for (const auto& [name, value] : each.flags) fields.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
  for (const auto& [name, value] : each.numbers)
    fields.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT32, 1);
  // The parser's own, the terminating zero counted.
  fields.emplace_back("plugin_namespace", "vim", PluginFieldType::kCHAR, 4);
  fields.emplace_back("plugin_version", "1", PluginFieldType::kCHAR, 2);
  return fields;
}

DynamicPluginTensorDesc DescOf(const Example& example, DataType io) {
  DynamicPluginTensorDesc desc = {};
  desc.desc.dims.nbDims = static_cast<int32_t>(example.shape.size());
  for (size_t d = 0; d < example.shape.size(); ++d)
    desc.desc.dims.d[d] = static_cast<std::remove_reference_t<decltype(desc.desc.dims.d[0])>>(example.shape[d]);
  desc.min = desc.max = desc.desc.dims;
  desc.desc.type = example.float32 ? DataType::kFLOAT : io;
  desc.desc.format = TensorFormat::kLINEAR;
  return desc;
}

std::vector<DynamicPluginTensorDesc> DescsOf(const Case& each, DataType io) {
  std::vector<DynamicPluginTensorDesc> descs;
  for (const Example& input : each.inputs) descs.push_back(DescOf(input, io));
  for (const Example& output : each.outputs) descs.push_back(DescOf(output, io));
  return descs;
}

// Symbolic dimensions: addresses that are only compared.
std::vector<DimsExprs> ExpressionsOf(const std::vector<Example>& tensors) {
  std::vector<DimsExprs> expressions;
  for (const Example& tensor : tensors) {
    DimsExprs each = {};
    each.nbDims = static_cast<int32_t>(tensor.shape.size());
    for (size_t d = 0; d < tensor.shape.size(); ++d)
      each.d[d] = reinterpret_cast<const IDimensionExpr*>(static_cast<uintptr_t>(tensor.shape[d]));
    expressions.push_back(each);
  }
  return expressions;
}

bool Same(const std::vector<DimsExprs>& a, const std::vector<DimsExprs>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].nbDims != b[i].nbDims) return false;
    for (int32_t d = 0; d < a[i].nbDims; ++d)
      if (a[i].d[d] != b[i].d[d]) return false;
  }
  return true;
}

void CheckOp(const Case& each) {
  const std::string op = each.op + ": ";
  const int inputs = static_cast<int>(each.inputs.size());
  auto layer = Create(each.op, FieldsOf(each));
  Check(layer != nullptr, op + "creates a plugin");
  if (layer == nullptr) return;
  Check(layer->Identity() == each.op + " 1 vim", op + "is of version 1, namespace vim");
  Check(layer->OutputCount() == static_cast<int>(each.outputs.size()), op + "number of outputs");
  Check(layer->Attributes() == each.attributes, op + "attributes " + layer->Attributes());
  const auto clone = layer->Clone(), reloaded = layer->Reloaded();
  Check(clone != nullptr && clone->Attributes() == each.attributes, op + "a clone is the same");
  Check(reloaded != nullptr && reloaded->Attributes() == each.attributes, op + "attributes survive a plan");

  for (int t = 0; t < 3; ++t) {
    const auto descs = DescsOf(each, kTypes[t]);
    bool all = true;
    for (int i = 0; i < static_cast<int>(descs.size()); ++i) all = all && layer->Format(i, descs, inputs);
    Check(all && layer->Configure(descs, inputs), op + "takes " + kTypeNames[t]);
    std::vector<DataType> in;
    bool types = true;
    for (int i = 0; i < inputs; ++i) in.push_back(descs[i].desc.type);
    const auto out = layer->Types(in);
    for (size_t i = 0; i < each.outputs.size(); ++i)
      types = types && out.size() == each.outputs.size() && out[i] == descs[inputs + i].desc.type;
    Check(types, op + "types of the outputs");
  }
  Check(Same(layer->Shapes(ExpressionsOf(each.inputs)), ExpressionsOf(each.outputs)), op + "shapes of the outputs");

  auto descs = DescsOf(each, DataType::kHALF);
  bool refuses = true;
  for (int i = 0; i < static_cast<int>(descs.size()); ++i) {
    auto changed = descs;
    changed[i].desc.type = descs[i].desc.type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    if (i > 0) refuses = refuses && !layer->Format(i, changed, inputs);  // the first decides the others' type
    changed[i].desc.type = DataType::kINT8;
    refuses = refuses && !layer->Format(i, changed, inputs);
    changed = descs;
    changed[i].desc.format = TensorFormat::kCHW2;
    refuses = refuses && !layer->Format(i, changed, inputs);
  }
  Check(refuses, op + "refuses every other type and format");

  // The first size of each input changed, one at a time: it is named, or the next that must agree with it.
  bool named = true;
  for (int i = 1; i < inputs; ++i) {
    auto changed = descs;
    auto& side = changed[i].max.d[0];
    side += 1;
    const bool taken = layer->Configure(changed, inputs);
    const std::string name = each.inputs[i].name == "weight_f" ? "weight_b" : each.inputs[i].name;
    named = named && !taken && Logged(name + " is of shape (");
  }
  Check(named, op + "names an input of another shape");
  const std::vector<DynamicPluginTensorDesc> few(descs.begin(), descs.begin() + each.required - 1);
  const int few_count = each.required - 1;
  auto with_outputs = few;
  with_outputs.insert(with_outputs.end(), descs.begin() + inputs, descs.end());
  Check(!layer->Configure(with_outputs, few_count) &&
            Logged("'layer': " + std::to_string(few_count) + " inputs and " + std::to_string(each.outputs.size())),
        op + "says how many inputs there must be");
  Check(Create(each.op, {PluginField("softplus", nullptr, PluginFieldType::kINT32, 1)}) == nullptr &&
            Logged("vim::" + each.op + " 'layer': there is no attribute 'softplus'"),
        op + "refuses an unknown attribute");
}

void CheckWords() {
  const auto cases = Cases();
  auto configure = [&](const Case& each, std::vector<DynamicPluginTensorDesc> descs, const std::string& says) {
    const auto layer = Create(each.op, FieldsOf(each));
    const int inputs = static_cast<int>(descs.size() - each.outputs.size());
    Check(!layer->Configure(descs, inputs) && Logged(says), "says: " + says);
  };
  const Case &scan = cases[0], &both = cases[1], &conv = cases[2], &norm = cases[3];
  auto descs = DescsOf(scan, DataType::kHALF);
  descs[1].max.d[1] = kLength + 1;
  configure(scan, descs, "delta is of shape (2, 1501, 48); it must be (2, 1500, 48)");
  descs = DescsOf(scan, DataType::kHALF);
  descs[2].max.d[1] = descs[3].max.d[3] = descs[4].max.d[3] = 300;
  configure(scan, descs, "states is 300");
  descs = DescsOf(scan, DataType::kHALF);
  descs[3].max.nbDims = 3;
  configure(scan, descs, "B is of shape (2, 1500, 1); it must be (2, 1500, groups, 16)");
  descs = DescsOf(scan, DataType::kHALF);
  descs[5].desc.type = DataType::kHALF;
  configure(scan, descs, "D is float16; it must be float32, whatever the type of u");
  descs.erase(descs.begin() + 6, descs.begin() + 8);
  descs[5].desc.type = DataType::kFLOAT;
  configure(scan, descs, "the shapes do not tell whether 1 of the optional inputs is D or delta_bias");
  descs[5].max.nbDims = 2;
  descs[5].max.d[1] = 5;
  configure(scan, descs, "after C come inputs of shape (48, 5); there may be D, z, delta_bias, in this order");

  descs = DescsOf(both, DataType::kHALF);
  descs[6].max.d[2] = descs[7].max.d[2] = 31;
  configure(both, descs, "x_f and x_b have rows of 31; they must hold B and C, 16 states each");
  descs = DescsOf(both, DataType::kHALF);
  descs[10].max.d[2] = 47;
  configure(both, descs, "z has rows of 47; they must hold 48 channels");

  descs = DescsOf(conv, DataType::kHALF);
  descs[0].max.d[2] = 40;
  configure(conv, descs, "x has rows of 40; they must hold 48 channels");
  descs = DescsOf(conv, DataType::kHALF);
  descs[1].max.d[0] = descs[3].max.d[0] = 17;
  configure(conv, descs, "taps is 17; it must be from 1 to 16");

  descs = DescsOf(norm, DataType::kHALF);
  descs[1].max.nbDims = 2;
  configure(norm, descs, "r is of shape (2, 1500); it must be (2, 1500, 48)");

  // Optional inputs in each way that shapes tell apart.
  descs = DescsOf(scan, DataType::kHALF);
  auto without = [&](std::vector<int> left_out) {
    auto fewer = descs;
    for (auto i = left_out.rbegin(); i != left_out.rend(); ++i) fewer.erase(fewer.begin() + *i);
    return Create(scan.op, FieldsOf(scan))->Configure(fewer, static_cast<int>(fewer.size()) - 1);
  };
  Check(without({5, 6, 7}) && without({7}) && without({5}) && without({6}) && without({5, 7}) && !without({6, 7}),
        "SelectiveScan: tells optional inputs apart by their ranks");
  logger.last.clear();
  descs = DescsOf(both, DataType::kHALF);
  descs.erase(descs.begin() + 13);
  Check(Create(both.op, FieldsOf(both))->Configure(descs, 13), "BiSelectiveScan: does without y_scale");
  descs = DescsOf(norm, DataType::kHALF);
  for (const int i : {0, 1, 3, 4}) {
    descs[i].max.nbDims = 4;
    for (int d = 3; d > 0; --d) descs[i].max.d[d] = descs[i].max.d[d - 1];
    descs[i].max.d[0] = 3;
  }
  Check(Create(norm.op, FieldsOf(norm))->Configure(descs, 3), "AddRMSNorm: takes any number of dimensions");
  auto expressions = ExpressionsOf(conv.inputs);
  expressions[0].nbDims = 2;
  Check(Create(conv.op, FieldsOf(conv))->Shapes(expressions).empty() &&
            Logged("x has 2 dimensions; it must be (batch, length, width)"),
        "BiCausalConv1d: no output shape without three dimensions");

  const int32_t seven = 7;
  const float half = 0.5f, negative = -1.0f;
  auto create = [&](const Case& each, const PluginField& field, const std::string& says) {
    auto layer = Create(each.op, {field});
    Check(layer == nullptr && Logged(says), "says: " + says);
  };
  create(scan, PluginField("reverse", &seven, PluginFieldType::kINT32, 1), "attribute reverse is 7; it must be 0 or 1");
  create(scan, PluginField("reverse", &half, PluginFieldType::kFLOAT32, 1),
         "attribute reverse must be one 32-bit integer");
  create(norm, PluginField("epsilon", &seven, PluginFieldType::kINT32, 1),
         "attribute epsilon must be one 32-bit float");
  const auto bad = Create(norm.op, {PluginField("epsilon", &negative, PluginFieldType::kFLOAT32, 1)});
  Check(!bad->Configure(DescsOf(norm, DataType::kHALF), 3) && Logged("epsilon is -1"), "says: epsilon is -1");
  Check(std::stof(Create(norm.op, {})->Attributes().substr(8)) == 1e-5f &&
            Create(scan.op, {})->Attributes() == "delta_softplus=1,reverse=0",
        "attributes that are absent have the contract's values");
}

float Round(float value, DataType io) {
  if (io == DataType::kHALF) return __half2float(__float2half_rn(value));
  if (io == kBf16) return __bfloat162float(__float2bfloat16_rn(value));
  return value;
}

std::vector<char> Pack(const Values& values, DataType type) {
  const size_t size = type == DataType::kFLOAT ? 4 : 2;
  std::vector<char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const __half half = __float2half_rn(values[i]);
    const __nv_bfloat16 brain = __float2bfloat16_rn(values[i]);
    const void* from = type == DataType::kFLOAT  ? static_cast<const void*>(&values[i])
                       : type == DataType::kHALF ? static_cast<const void*>(&half)
                                                 : static_cast<const void*>(&brain);
    std::memcpy(&bytes[i * size], from, size);
  }
  return bytes;
}

Values Unpack(const std::vector<char>& bytes, DataType type) {
  const size_t size = type == DataType::kFLOAT ? 4 : 2;
  Values values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == DataType::kFLOAT) {
      std::memcpy(&values[i], &bytes[i * 4], 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, &bytes[i * 2], 2);
      if (type == DataType::kHALF) {
        __half half;
        std::memcpy(static_cast<void*>(&half), &bits, 2);
        values[i] = __half2float(half);
      } else {
        const uint32_t wide = uint32_t{bits} << 16;
        std::memcpy(&values[i], &wide, 4);
      }
    }
  }
  return values;
}

// One context's run; the worst relative RMS error of an output, infinity when it could not run.
double RunOnGpu(const Case& each, Layer* attached, DataType io, unsigned seed) {
  const int inputs = static_cast<int>(each.inputs.size());
  std::vector<PluginTensorDesc> descs;
  for (const auto& desc : DescsOf(each, io)) descs.push_back(desc.desc);
  std::mt19937 random(seed);
  std::vector<Values> values;
  std::vector<std::vector<char>> bytes;
  for (const Example& input : each.inputs) {
    values.push_back(RandomValues(input, &random));
    if (!input.float32)
      for (float& value : values.back()) value = Round(value, io);
    bytes.push_back(Pack(values.back(), input.float32 ? DataType::kFLOAT : io));
  }
  for (const Example& output : each.outputs)  // NaN, in every type
    bytes.push_back(Pack(Values(RandomValues(output, &random).size(), NAN), output.float32 ? DataType::kFLOAT : io));
  std::vector<void*> device(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (cudaMalloc(&device[i], bytes[i].size()) != cudaSuccess) return INFINITY;
    cudaMemcpy(device[i], bytes[i].data(), bytes[i].size(), cudaMemcpyHostToDevice);
  }
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaDeviceSynchronize();
  void* workspace = nullptr;
  const size_t size = attached->Workspace(DescsOf(each, io), inputs);
  if (each.op.find("Scan") != std::string::npos && size == 0) return INFINITY;
  if (size > 0 && cudaMalloc(&workspace, size) != cudaSuccess) return INFINITY;
  const int status = attached->Enqueue(descs, inputs, device.data(), workspace, stream);
  const bool ran = cudaStreamSynchronize(stream) == cudaSuccess && status == 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (static_cast<int>(i) >= inputs) cudaMemcpy(bytes[i].data(), device[i], bytes[i].size(), cudaMemcpyDeviceToHost);
    cudaFree(device[i]);
  }
  cudaFree(workspace);
  cudaStreamDestroy(stream);
  if (!ran) return INFINITY;

  double worst = 0;
  const Outputs golden = each.golden(values);
  for (size_t o = 0; o < golden.size(); ++o) {
    const Values got = Unpack(bytes[inputs + o], each.outputs[o].float32 ? DataType::kFLOAT : io);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += std::pow(got[i] - golden[o][i], 2);
      norm += std::pow(golden[o][i], 2);
    }
    const double error = std::sqrt(difference / norm);
    if (!(error <= worst)) worst = error;  // keeps a NaN
  }
  return worst;
}

void CheckRun(const Case& each) {
  const double tolerance[] = {2e-6, 5e-4, 4e-3};
  for (int t = 0; t < 3; ++t) {
    const auto layer = Create(each.op, FieldsOf(each));
    layer->Configure(DescsOf(each, kTypes[t]), static_cast<int>(each.inputs.size()));
    const auto reloaded = layer->Reloaded();
    double errors[2];
    std::thread threads[2];
    for (int i = 0; i < 2; ++i)
      threads[i] = std::thread([&, i] {
        const auto attached = reloaded->Attached();
        errors[i] = RunOnGpu(each, attached.get(), kTypes[t], 10 * t + i);
      });
    for (auto& thread : threads) thread.join();
    for (const double error : errors) {
      char text[120];
      std::snprintf(text, sizeof text, "%s: %s runs in its own context: %.1e", each.op.c_str(), kTypeNames[t], error);
      Check(error <= tolerance[t], text);
    }
  }
}

}  // namespace

#if NV_TENSORRT_MAJOR < 10
// What the library finds by name in the process that loads it.
extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept {
  static Registry* const registry = new Registry;
  return registry;
}
extern "C" __attribute__((visibility("default"))) ILogger* getLogger() noexcept { return &logger; }
#endif

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  if (!Load(argv[1])) return 1;
  const auto cases = Cases();
  Check(creators.size() == cases.size(), "as many creators as ops");
  for (const Case& each : cases) {
    if (creators.count(each.op) == 0) {
      Check(false, "has a creator of " + each.op);
      return 1;
    }
    CheckOp(each);
  }
  CheckWords();
  if (argc > 2 && std::strcmp(argv[2], "--gpu") == 0)
    for (const Case& each : cases) CheckRun(each);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
