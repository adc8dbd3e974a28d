// Drives the TensorRT plugin as TensorRT would, without TensorRT: finds the creator in the library, creates the plugin,
// asks it everything a builder asks, and with --gpu also runs it on a card from two contexts in two threads and
// compares with the CPU kernel.
//
//   trt_plugin_host libvimdeploy_trt.so [--gpu]
//
// Prints one line a check; exit code 1 when one fails.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "vim/selective_scan.h"

namespace {

using namespace nvinfer1;

int checks = 0, failures = 0;

void Check(bool passed, const std::string& what) {
  ++checks;
  failures += !passed;
  std::printf("%s %s\n", passed ? "ok    " : "FAILED", what.c_str());
}

class Logger : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override { last = text; }
  std::string last;
} logger;

class Finder : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
} finder;

bool Logged(const std::string& part) {
  const bool found = logger.last.find(part) != std::string::npos;
  if (!found) std::printf("       logged instead: %s\n", logger.last.c_str());
  logger.last.clear();
  return found;
}

template <typename T>
T* Capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

IPluginV3* Create(IPluginCreatorV3One* creator, int32_t softplus, int32_t reverse) {
  const PluginField fields[] = {PluginField("delta_softplus", &softplus, PluginFieldType::kINT32, 1),
                                PluginField("reverse", &reverse, PluginFieldType::kINT32, 1),
                                PluginField("plugin_namespace", "vim", PluginFieldType::kCHAR, 4),
                                PluginField("plugin_version", "1", PluginFieldType::kCHAR, 2)};
  const PluginFieldCollection collection = {4, fields};
  return creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

constexpr int32_t kBatch = 2, kLength = 67, kChannels = 48, kStates = 16;

std::vector<DynamicPluginTensorDesc> Descs(DataType io, int32_t inputs = 8) {
  const Dims row = {3, {kBatch, kLength, kChannels}}, matrix = {2, {kChannels, kStates}},
             states = {4, {kBatch, kLength, 1, kStates}}, vector = {1, {kChannels}};
  const Dims dims[] = {row, row, matrix, states, states, vector, row, vector};
  std::vector<DynamicPluginTensorDesc> descs;
  for (int32_t i = 0; i <= inputs; ++i) {
    DynamicPluginTensorDesc each = {};
    each.desc.dims = each.min = each.opt = each.max = i == inputs ? row : dims[i];
    each.desc.type = i < inputs && (i == 2 || i == 5 || i == 7) ? DataType::kFLOAT : io;
    each.desc.format = TensorFormat::kLINEAR;
    descs.push_back(each);
  }
  return descs;
}

void CheckBuild(IPluginCreatorV3One* creator) {
  IPluginV3* plugin = Create(creator, 0, 1);
  Check(plugin != nullptr, "creates a plugin");
  auto* build = Capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  auto* core = Capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  auto* runtime = Capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  Check(std::string(core->getPluginName()) == "SelectiveScan" && std::string(core->getPluginNamespace()) == "vim" &&
            std::string(core->getPluginVersion()) == "1",
        "is vim SelectiveScan 1");
  Check(build->getNbOutputs() == 1 && build->getFormatCombinationLimit() == 3, "one output, three combinations");
  Check(std::string(build->getTimingCacheID()) == "delta_softplus=0,reverse=1", "timing-cache ID holds the attributes");

  const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
  IPluginV3* again = creator->createPlugin("layer", fields, TensorRTPhase::kRUNTIME);
  Check(fields->nbFields == 2 && again != nullptr &&
            std::string(Capability<IPluginV3OneBuild>(again, PluginCapabilityType::kBUILD)->getTimingCacheID()) ==
                "delta_softplus=0,reverse=1",
        "fields survive serialisation");
  IPluginV3* copy = plugin->clone();
  Check(std::string(Capability<IPluginV3OneBuild>(copy, PluginCapabilityType::kBUILD)->getTimingCacheID()) ==
            "delta_softplus=0,reverse=1",
        "a clone is the same");

  for (const DataType io : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    auto descs = Descs(io);
    bool all = true;
    for (int32_t i = 0; i <= 8; ++i) all &= build->supportsFormatCombination(i, descs.data(), 8, 1);
    Check(all, "takes type " + std::to_string(static_cast<int>(io)));
    Check(build->configurePlugin(descs.data(), 8, &descs[8], 1) == 0, "configures for it");
    DataType out;
    DataType in[8];
    for (int32_t i = 0; i < 8; ++i) in[i] = descs[i].desc.type;
    Check(build->getOutputDataTypes(&out, 1, in, 8) == 0 && out == io, "the output is of u's type");
  }
  auto refuse = [&](int32_t position, void (*change)(DynamicPluginTensorDesc*), const std::string& what) {
    auto descs = Descs(DataType::kHALF);
    change(&descs[position]);
    Check(!build->supportsFormatCombination(position, descs.data(), 8, 1), "refuses " + what);
  };
  refuse(0, [](DynamicPluginTensorDesc* d) { d->desc.type = DataType::kINT8; }, "int8");
  refuse(0, [](DynamicPluginTensorDesc* d) { d->desc.format = TensorFormat::kCHW2; }, "a packed format");
  refuse(2, [](DynamicPluginTensorDesc* d) { d->desc.type = DataType::kHALF; }, "A in fp16");
  refuse(3, [](DynamicPluginTensorDesc* d) { d->desc.type = DataType::kFLOAT; }, "B in another type than u");
  refuse(5, [](DynamicPluginTensorDesc* d) { d->desc.type = DataType::kHALF; }, "D in fp16");
  refuse(8, [](DynamicPluginTensorDesc* d) { d->desc.type = DataType::kFLOAT; }, "an output of another type than u");

  auto configure = [&](std::vector<DynamicPluginTensorDesc> descs, const std::string& says) {
    const int32_t inputs = static_cast<int32_t>(descs.size()) - 1;
    const bool refused = build->configurePlugin(descs.data(), inputs, &descs[inputs], 1) != 0;
    Check(refused && Logged(says), "says: " + says);
  };
  auto descs = Descs(DataType::kHALF);
  descs[1].max.d[1] = kLength + 1;
  configure(descs, "delta is of shape (2, 68, 48); it must be (2, 67, 48)");
  descs = Descs(DataType::kHALF);
  descs[2].max.d[1] = 300;
  descs[3].max.d[3] = descs[4].max.d[3] = 300;
  configure(descs, "states is 300");
  descs = Descs(DataType::kHALF);
  descs[0].max.nbDims = 4;
  configure(descs, "u is of shape");
  configure(Descs(DataType::kHALF, 4), "4 inputs");
  configure(Descs(DataType::kHALF, 6), "one vector follows C");
  Check(build->configurePlugin(Descs(DataType::kHALF, 5).data(), 5, descs.data(), 1) == 0, "five inputs will do");
  Check(build->configurePlugin(Descs(DataType::kHALF, 7).data(), 7, descs.data(), 1) == 0, "so will D and z");

  const int32_t seven = 7;
  const float half = 0.5f;
  auto create = [&](const PluginField& field, const std::string& says) {
    const PluginFieldCollection collection = {1, &field};
    Check(creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD) == nullptr && Logged(says),
          "says: " + says);
  };
  create(PluginField("reverse", &seven, PluginFieldType::kINT32, 1), "attribute reverse is 7; it must be 0 or 1");
  create(PluginField("reverse", &half, PluginFieldType::kFLOAT32, 1), "attribute reverse must be one 32-bit integer");
  create(PluginField("softplus", &seven, PluginFieldType::kINT32, 1), "there is no attribute 'softplus'");
  delete plugin;
  delete again;
  delete copy;
}

// One context's run in fp32, against the CPU kernel.
double RunOnGpu(IPluginV3* attached, int32_t reverse, unsigned seed) {
  auto* runtime = Capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
  auto dynamic = Descs(DataType::kFLOAT);
  std::vector<PluginTensorDesc> descs;
  for (const auto& each : dynamic) descs.push_back(each.desc);
  if (runtime->onShapeChange(descs.data(), 8, &descs[8], 1) != 0) return INFINITY;

  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> host(9);
  std::vector<void*> device(9);
  for (int i = 0; i < 9; ++i) {
    size_t count = 1;
    for (int d = 0; d < descs[i].dims.nbDims; ++d) count *= descs[i].dims.d[d];
    host[i].resize(count);
    for (float& value : host[i]) value = i == 8 ? NAN : i == 2 ? -std::exp(normal(random)) : normal(random);
    if (cudaMalloc(&device[i], count * sizeof(float)) != cudaSuccess) return INFINITY;
    cudaMemcpy(device[i], host[i].data(), count * sizeof(float), cudaMemcpyHostToDevice);
  }
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  const int32_t status = runtime->enqueue(descs.data(), &descs[8], device.data(), &device[8], nullptr, stream);
  const bool ran = cudaStreamSynchronize(stream) == cudaSuccess && status == 0;
  cudaMemcpy(host[8].data(), device[8], host[8].size() * sizeof(float), cudaMemcpyDeviceToHost);
  for (void* each : device) cudaFree(each);
  cudaStreamDestroy(stream);
  if (!ran) return INFINITY;

  vim_selective_scan_desc desc = {};
  desc.batch = kBatch;
  desc.length = kLength;
  desc.channels = kChannels;
  desc.states = kStates;
  desc.groups = 1;
  desc.io = VIM_F32;
  desc.delta_softplus = 1;
  desc.reverse = reverse;
  desc.has_D = desc.has_z = desc.has_delta_bias = 1;
  vim_selective_scan_contiguous(&desc);
  std::vector<float> wanted(host[8].size());
  const vim_selective_scan_args args = {host[0].data(), host[1].data(), host[2].data(), host[3].data(), host[4].data(),
                                        host[5].data(), host[6].data(), host[7].data(), wanted.data()};
  if (vim_selective_scan_cpu(&desc, &args, nullptr, nullptr) != VIM_OK) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    difference += std::pow(double{host[8][i]} - wanted[i], 2);
    norm += std::pow(double{wanted[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

void CheckRun(IPluginCreatorV3One* creator) {
  for (const int32_t reverse : {0, 1}) {
    IPluginV3* plugin = Create(creator, 1, reverse);
    auto* runtime = Capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    double errors[2];
    std::thread threads[2];
    for (int i = 0; i < 2; ++i)
      threads[i] = std::thread([&, i] {
        IPluginV3* attached = runtime->attachToContext(nullptr);
        errors[i] = RunOnGpu(attached, reverse, 10 * reverse + i);
        delete attached;
      });
    for (auto& thread : threads) thread.join();
    for (const double error : errors) {
      char text[80];
      std::snprintf(text, sizeof(text), "reverse=%d runs in its own context: %.1e of the CPU kernel", reverse, error);
      Check(error < 2e-6, text);
    }
    delete plugin;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  const auto get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  const auto set = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) return 1;
  set(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const creators = get(count);
  IPluginCreatorV3One* scan = nullptr;
  for (int32_t i = 0; i < count; ++i) {
    auto* each = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::string(each->getPluginName()) == "SelectiveScan") scan = each;
  }
  Check(scan != nullptr, "has a creator of SelectiveScan");
  if (scan != nullptr) {
    CheckBuild(scan);
    if (argc > 2 && std::strcmp(argv[2], "--gpu") == 0) CheckRun(scan);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
