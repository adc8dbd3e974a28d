// .plan files through TensorRT. One source for 8.5 to 11: whatever is used here is in all of them under one name, but
// the classes' layout follows the major version, so a build serves the major version of its headers.
#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "backend.h"
#include "cuda_driver.h"
#include "element.h"
#include "library.h"
#include "metadata.h"
#include "refuse.h"
#include "sidecar.h"

namespace vimdeploy {
namespace {

constexpr const char* kBuildAgain = "build it again on this host with `vimdeploy build-engine`";
constexpr const char* kPluginName = "SelectiveScan";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "vim";

#if NV_TENSORRT_MAJOR >= 10
constexpr bool kPluginsRegisterThemselves = false;
#else
constexpr bool kPluginsRegisterThemselves = true;
#endif

// Keeps what TensorRT complains of, for the error that follows. TensorRT logs from any thread.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
    } catch (const std::exception&) {
      // No memory for the message: the error goes without.
    }
  }

  // Also forgets them.
  std::string TakeErrors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string errors = errors_.empty() ? "no reason given" : std::move(errors_);
    errors_.clear();
    return errors;
  }

 private:
  std::mutex mutex_;
  std::string errors_;
};

// One loaded libnvinfer. Never freed: plugins registered with it outlive models.
struct TensorRt {
  std::string version;  // "10.14.1"
  void* (*create_runtime)(void* logger, std::int32_t version) = nullptr;
  nvinfer1::IPluginRegistry* registry = nullptr;
  std::map<std::string, std::string> plugins;  // SHA-256 of a loaded plugin library → its path
};

std::mutex& LoadMutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

// Call under LoadMutex.
TensorRt& LoadTensorRt(const std::string& path) {
  static auto* const loaded = new std::map<void*, TensorRt>;
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  const std::string hint = "install TensorRT " + major + ", or let VIMDEPLOY_TENSORRT name its libnvinfer.so." + major;
  const Library library = LoadLibrary({"TensorRT " + major,
                                       path,
                                       "VIMDEPLOY_TENSORRT",
                                       {"libnvinfer.so." + major},
                                       hint,
                                       // A plugin for 8.5 leaves TensorRT's functions to be found in the process.
                                       kPluginsRegisterThemselves});
  if (const auto found = loaded->find(library.handle); found != loaded->end()) return found->second;
  const auto get_version = reinterpret_cast<std::int32_t (*)()>(library.Symbol("getInferLibVersion"));
  const auto get_registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(library.Symbol("getPluginRegistry"));
  TensorRt trt;
  trt.create_runtime = reinterpret_cast<decltype(trt.create_runtime)>(library.Symbol("createInferRuntime_INTERNAL"));
  if (get_version == nullptr || get_registry == nullptr || trt.create_runtime == nullptr)
    RefuseMissing(library.name + " is not TensorRT: it lacks its functions", hint);
  // 8503 is 8.5.3; from 10 on, 101401 is 10.14.1.
  const int number = get_version();
  const int step = number >= 100000 ? 10000 : 1000;
  trt.version =
      std::to_string(number / step) + "." + std::to_string(number % step / 100) + "." + std::to_string(number % 100);
  if (number / step != NV_TENSORRT_MAJOR) {
    RefuseMissing(library.name + " is TensorRT " + trt.version + "; this library was built for TensorRT " + major,
                  "build it with the headers of TensorRT " + std::to_string(number / step) + ", or " + hint);
  }
  trt.registry = get_registry();
  return loaded->emplace(library.handle, std::move(trt)).first->second;
}

bool PluginIsRegistered(const TensorRt& trt) {
#if NV_TENSORRT_MAJOR >= 10
  return trt.registry->getCreator(kPluginName, kPluginVersion, kPluginNamespace) != nullptr;
#else
  return trt.registry->getPluginCreator(kPluginName, kPluginVersion, kPluginNamespace) != nullptr;
#endif
}

struct Plugin {
  std::string path;
  std::string sha256;
};

// The library a plan needs: the one that was named; else where the sidecar saw it, beside the plan, what
// VIMDEPLOY_TRT_PLUGIN names, beside this library. Only the very file the plan was built with is taken.
Plugin FindPlugin(const Sidecar& sidecar, const std::string& plan, const OpenOptions& options) {
  const std::string hint = "name the plugin library that the plan was built with, or build the plan again";
  std::vector<std::string> places = {options.plugin_library};
  if (options.plugin_library.empty()) {
    const std::string name = NameOf(sidecar.plugin);
    places = {sidecar.plugin, FolderOf(plan) + "/" + name};
    const char* const variable = std::getenv("VIMDEPLOY_TRT_PLUGIN");
    if (variable != nullptr && *variable != '\0') places.emplace_back(variable);
    if (const std::string folder = OwnFolder(); !folder.empty()) places.push_back(folder + "/" + name);
  }
  std::string other;
  std::string looked;
  for (const std::string& place : places) {
    looked += (looked.empty() ? "" : " nor ") + place;
    if (!IsFile(place)) continue;
    if (!options.check_hashes) return {place, place};
    if (Sha256Of(place) == sidecar.plugin_sha256) return {place, sidecar.plugin_sha256};
    if (other.empty()) other = place;
  }
  if (other.empty()) RefuseMissing("the plugin library of " + plan + " is not there: " + looked, hint);
  RefuseMissing(other + " is not the plugin library that " + plan + " was built with (SHA-256 differs)", hint);
}

// Call under LoadMutex.
void LoadPlugin(TensorRt* trt, const Plugin& plugin) {
  const std::string& path = plugin.path;
  const std::string hint = "name the plugin library for this TensorRT and host";
  if (trt->plugins.count(plugin.sha256) != 0) return;
  const std::string who = std::string(kPluginNamespace) + "::" + kPluginName + " version " + kPluginVersion;
  // The registry has one creator a name: a second library's would be dropped, or would compute the first one's plans.
  if (PluginIsRegistered(*trt)) {
    if (trt->plugins.empty()) return;  // the program registered it itself
    RefuseMissing(
        "this process has " + who + " from " + trt->plugins.begin()->second + " and cannot take another from " + path,
        "open plans of one plugin library in a process");
  }
#if NV_TENSORRT_MAJOR >= 10
  if (trt->registry->loadLibrary(path.c_str()) == nullptr && !PluginIsRegistered(*trt))
    RefuseMissing("TensorRT " + trt->version + " cannot load the plugin library " + path, hint);
#else
  const Library library = LoadLibrary({"the plugin library", path, nullptr, {}, hint, true});
  // Where it could not register while it was loaded.
  using Register = int (*)(void* registry);
  const auto add = reinterpret_cast<Register>(library.Symbol("vimdeploy_register_plugins"));
  if (add != nullptr && add(trt->registry) == 0)
    RefuseMissing("the plugin library " + path + " could not register with TensorRT " + trt->version, hint);
#endif
  if (!PluginIsRegistered(*trt)) RefuseMissing("the plugin library " + path + " does not register " + who, hint);
  trt->plugins.emplace(plugin.sha256, path);
}

Element ElementOf(nvinfer1::DataType type, const std::string& path, const std::string& name) {
  if (type == nvinfer1::DataType::kFLOAT) return Element::kFloat;
  if (type == nvinfer1::DataType::kHALF) return Element::kHalf;
#if NV_TENSORRT_MAJOR >= 9
  if (type == nvinfer1::DataType::kBF16) return Element::kBfloat16;
#endif
  RefuseInput(path + ": " + name + " is neither fp32, fp16 nor bf16", kBuildAgain);
}

std::vector<std::int64_t> ShapeOf(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) RefuseInput(path + " cannot be read", "check its permissions");
  return bytes;
}

class TrtModel : public ModelImpl {
 public:
  explicit TrtModel(const CudaDevice& cuda) : device(cuda) {}

  ~TrtModel() override {
    try {
      const CudaDevice::Active active(device);
      engine.reset();
      trt.reset();
    } catch (const Error&) {
      // The device is lost, and the engine with it.
    }
  }

  std::unique_ptr<ContextImpl> NewContext(void* stream) const override;

  // A second copy of the plan in device memory, or the first.
  std::shared_ptr<nvinfer1::ICudaEngine> Deserialize() const {
    const std::string bytes = ReadFile(path);
    std::shared_ptr<nvinfer1::ICudaEngine> copy(trt->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (copy == nullptr)
      RefuseInput("TensorRT " + version + " cannot read " + path + ": " + log.TakeErrors(), kBuildAgain);
    return copy;
  }

  const CudaDevice& device;
  std::string path;
  std::string version;
  mutable Log log;  // outlives everything made with it
  std::unique_ptr<nvinfer1::IRuntime> trt;
  std::shared_ptr<nvinfer1::ICudaEngine> engine;
  struct Node {
    std::string name;
    Element element;
  };
  Node input;
  std::vector<Node> outputs;
  std::size_t image_size = 0;  // elements
  bool cuda_graph = false;
};

// Device memory that grows.
class Buffer {
 public:
  explicit Buffer(const CudaDevice& device) : device_(device) {}
  Buffer(Buffer&& other) noexcept : device_(other.device_), memory_(other.memory_), size_(other.size_) {
    other.memory_ = nullptr;
  }
  // Inside a CudaDevice::Active.
  ~Buffer() { Release(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;

  void* AtLeast(std::size_t bytes) {
    if (bytes > size_) {
      Release();
      memory_ = device_.Allocate(bytes);
      size_ = bytes;
    }
    return memory_;
  }

 private:
  void Release() noexcept {
    if (memory_ != nullptr) device_.Free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

  const CudaDevice& device_;
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

class TrtContext : public ContextImpl {
 public:
  TrtContext(const TrtModel& model, void* stream)
      : model_(model), engine_(model.engine), stream_(stream), scratch_(std::in_place, model.device) {
    const CudaDevice::Active active(model.device);
    context_ = NewExecutionContext();
#if NV_TENSORRT_MAJOR < 10
    // Before profiles could be shared, a second context of a dynamic engine found its only profile taken and got none:
    // it then needs an engine of its own.
    if (context_->getOptimizationProfile() < 0) {
      context_.reset();
      engine_ = model.Deserialize();
      context_ = NewExecutionContext();
    }
#endif
    if (stream_ == nullptr) stream_ = own_stream_ = model.device.NewStream();
    input_.emplace_back(model.device);
    for (std::size_t i = 0; i < model.outputs.size(); ++i) output_.emplace_back(model.device);
  }

  ~TrtContext() override {
    try {
      const CudaDevice::Active active(model_.device);
      Forget();
      if (own_stream_ != nullptr) model_.device.DestroyStream(own_stream_);
      context_.reset();
      engine_.reset();
      input_.clear();
      output_.clear();
      scratch_.reset();
    } catch (const Error&) {
      // The device is lost, and the memory with it.
    }
  }

  void Run(const float* images, std::int64_t batch, std::vector<Tensor>* outputs) override {
    const CudaDevice& device = model_.device;
    const CudaDevice::Active active(device);
    const std::size_t count = static_cast<std::size_t>(batch) * model_.image_size;
    const std::size_t bytes = count * SizeOf(model_.input.element);
    const void* from = images;
    if (model_.input.element != Element::kFloat) {
      staging_.resize(bytes);
      FromFloat(images, count, model_.input.element, staging_.data());
      from = staging_.data();
    }
    void* const input = input_.front().AtLeast(bytes);
    device.CopyIn(input, from, bytes, stream_);
    const nvinfer1::IExecutionContext& shapes = OfBatch(batch);
    outputs->resize(model_.outputs.size());
    std::vector<void*> addresses;
    for (std::size_t i = 0; i < model_.outputs.size(); ++i) {
      Tensor& output = (*outputs)[i];
      output.name = model_.outputs[i].name;
      output.shape = ShapeOf(shapes.getTensorShape(output.name.c_str()));
      std::size_t size = 1;
      for (const std::int64_t side : output.shape) {
        if (side < 0) RefuseInput(model_.path + ": the shape of " + output.name + " is not known", kBuildAgain);
        size *= static_cast<std::size_t>(side);
      }
      output.values.resize(size);
      addresses.push_back(output_[i].AtLeast(size * SizeOf(model_.outputs[i].element)));
    }
    if (model_.cuda_graph) {
      device.Launch(Recorded(input, addresses, batch).graph, stream_);
    } else {
      Start(context_.get(), input, addresses, batch, stream_);
    }
    for (std::size_t i = 0; i < addresses.size(); ++i) {
      Tensor& output = (*outputs)[i];
      const Element element = model_.outputs[i].element;
      const std::size_t size = output.values.size() * SizeOf(element);
      if (element == Element::kFloat) {
        device.CopyOut(output.values.data(), addresses[i], size, stream_);
        continue;
      }
      staging_.resize(size);
      device.CopyOut(staging_.data(), addresses[i], size, stream_);
      device.Synchronize(stream_);
      ToFloat(staging_.data(), output.values.size(), element, output.values.data());
    }
    device.Synchronize(stream_);
  }

  void Enqueue(const void* images, std::int64_t batch, const std::vector<void*>& outputs, void* stream) override {
    if (outputs.size() != model_.outputs.size()) {
      RefuseInput(
          std::to_string(outputs.size()) + " output pointers for a model of " + std::to_string(model_.outputs.size()),
          "pass one for each output");
    }
    const CudaDevice::Active active(model_.device);
#if NV_TENSORRT_MAJOR < 10
    Forget();  // it is this context that was recorded
#endif
    SetBatch(context_.get(), batch);
    Start(context_.get(), images, outputs, batch, stream != nullptr ? stream : stream_);
  }

 private:
  std::unique_ptr<nvinfer1::IExecutionContext> NewExecutionContext() const {
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext());
    if (context == nullptr) {
      RefuseMissing("TensorRT cannot make a context for " + model_.path + ": " + model_.log.TakeErrors(),
                    "free device memory, or open fewer contexts");
    }
    return context;
  }

  // One batch size as a graph. It is good only while the context it was recorded from stays as it was, so that each has
  // one of its own; these share their memory, since they take turns on one stream. Before TensorRT 10 the engine's one
  // profile serves one context.
  struct Recording {
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    void* graph = nullptr;
  };

  // A context that has the shapes of this batch; a recorded one is left alone.
  const nvinfer1::IExecutionContext& OfBatch(std::int64_t batch) {
    const auto found = recordings_.find(batch);
    if (found == recordings_.end()) {
      SetBatch(context_.get(), batch);
      return *context_;
    }
    return found->second.context != nullptr ? *found->second.context : *context_;
  }

  const Recording& Recorded(void* input, const std::vector<void*>& outputs, std::int64_t batch) {
    std::vector<void*> addresses = outputs;
    addresses.push_back(input);
    if (addresses != recorded_at_) {  // a larger batch has moved the buffers
      Forget();
      recorded_at_ = std::move(addresses);
    }
    const auto found = recordings_.find(batch);
    if (found != recordings_.end()) return found->second;
    Recording recording;
    nvinfer1::IExecutionContext* context = context_.get();
#if NV_TENSORRT_MAJOR >= 10
    recording.context = NewSharingContext();
    context = recording.context.get();
#else
    Forget();
#endif
    SetBatch(context, batch);
    Start(context, input, outputs, batch, stream_);  // the first run of a shape may set things up
    const CudaDevice& device = model_.device;
    device.Synchronize(stream_);
    device.BeginCapture(stream_);
    try {
      Start(context, input, outputs, batch, stream_);
    } catch (...) {
      device.AbandonCapture(stream_);
      throw;
    }
    recording.graph = device.EndCapture(stream_);
    return recordings_.emplace(batch, std::move(recording)).first->second;
  }

  // Inside a CudaDevice::Active.
  void Forget() noexcept {
    for (const auto& entry : recordings_) model_.device.DestroyGraph(entry.second.graph);
    recordings_.clear();
  }

#if NV_TENSORRT_MAJOR >= 10
  std::unique_ptr<nvinfer1::IExecutionContext> NewSharingContext() {
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context == nullptr) {
      RefuseMissing("TensorRT cannot make another context for " + model_.path + ": " + model_.log.TakeErrors(),
                    "open the plan without OpenOptions::cuda_graph");
    }
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 1
    const std::int64_t size = engine_->getDeviceMemorySizeV2();
    context->setDeviceMemoryV2(scratch_->AtLeast(static_cast<std::size_t>(size)), size);
#else
    context->setDeviceMemory(scratch_->AtLeast(engine_->getDeviceMemorySize()));
#endif
    return context;
  }
#endif

  void SetBatch(nvinfer1::IExecutionContext* context, std::int64_t batch) {
    nvinfer1::Dims dims{};
    dims.nbDims = 4;
    const std::int64_t shape[] = {batch, model_.info.channels, model_.info.height, model_.info.width};
    // Dims::d is of 32 bits before TensorRT 10.
    std::transform(shape, shape + 4, dims.d,
                   [](std::int64_t side) { return static_cast<std::decay_t<decltype(dims.d[0])>>(side); });
    if (!context->setInputShape(model_.input.name.c_str(), dims)) RefuseRun(batch);
  }

  void Start(nvinfer1::IExecutionContext* context, const void* images, const std::vector<void*>& outputs,
             std::int64_t batch, void* stream) {
    // The engine's input: TensorRT only reads it.
    bool good = context->setTensorAddress(model_.input.name.c_str(), const_cast<void*>(images));
    for (std::size_t i = 0; i < outputs.size(); ++i)
      good = context->setTensorAddress(model_.outputs[i].name.c_str(), outputs[i]) && good;
    if (!good || !context->enqueueV3(static_cast<cudaStream_t>(stream))) RefuseRun(batch);
  }

  [[noreturn]] void RefuseRun(std::int64_t batch) const {
    RefuseInput("TensorRT could not run " + model_.path + " on a batch of " + std::to_string(batch) + ": " +
                    model_.log.TakeErrors(),
                "check the plan with `vimdeploy verify parity`");
  }

  const TrtModel& model_;
  std::shared_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  void* stream_;
  void* own_stream_ = nullptr;
  std::vector<Buffer> input_;  // one; a vector, so that it can be freed while the device is current
  std::vector<Buffer> output_;
  std::optional<Buffer> scratch_;  // what the recorded contexts work in
  std::vector<char> staging_;
  std::map<std::int64_t, Recording> recordings_;  // by batch
  std::vector<void*> recorded_at_;                // the buffers they read and write
};

std::unique_ptr<ContextImpl> TrtModel::NewContext(void* stream) const {
  return std::make_unique<TrtContext>(*this, stream);
}

// The first three numbers of "10.14.1.48": all that getInferLibVersion gives.
std::array<int, 3> Numbers(const std::string& version) {
  std::array<int, 3> numbers{};
  std::sscanf(version.c_str(), "%d.%d.%d", &numbers[0], &numbers[1], &numbers[2]);
  return numbers;
}

void CheckHost(const std::string& path, const Sidecar& sidecar, const TensorRt& trt, const CudaDevice& device) {
  const bool newer = sidecar.version_compatible && Numbers(trt.version) >= Numbers(sidecar.tensorrt);
  if (Numbers(sidecar.tensorrt) != Numbers(trt.version) && !newer) {
    RefuseInput(path + " was built by TensorRT " + sidecar.tensorrt + "; this host has " + trt.version +
                    ", and a plan loads only in the version that built it",
                kBuildAgain);
  }
  if (sidecar.sm != device.sm()) {
    RefuseInput(path + " was built for sm_" + std::to_string(sidecar.sm) + "; this is " + device.name() + " (sm_" +
                    std::to_string(device.sm()) + ")",
                kBuildAgain);
  }
}

void ReadNodes(TrtModel* model, const Sidecar& sidecar) {
  const nvinfer1::ICudaEngine& engine = *model->engine;
  int inputs = 0;
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    const std::string name = engine.getIOTensorName(i);
    TrtModel::Node node{name, ElementOf(engine.getTensorDataType(name.c_str()), model->path, name)};
    if (engine.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT) {
      model->input = std::move(node);
      ++inputs;
    } else {
      model->outputs.push_back(std::move(node));
    }
  }
  if (inputs != 1 || model->outputs.empty()) {
    RefuseInput(model->path + " has " + std::to_string(inputs) + " inputs and " +
                    std::to_string(model->outputs.size()) + " outputs; a Vim has one input, the images",
                kBuildAgain);
  }
  model->info = InfoFromProps(sidecar.props, sidecar.path);
  const char* const input = model->input.name.c_str();
  const std::int64_t batch = CheckInputShape(ShapeOf(engine.getTensorShape(input)), model->info, model->path);
  model->min_batch = model->max_batch = batch;
  if (batch < 0) {
    const auto batch_of = [&](nvinfer1::OptProfileSelector which) {
      return engine.getProfileShape(input, 0, which).d[0];
    };
    model->min_batch = batch_of(nvinfer1::OptProfileSelector::kMIN);
    model->max_batch = batch_of(nvinfer1::OptProfileSelector::kMAX);
  }
  model->image_size = static_cast<std::size_t>(model->info.channels) * static_cast<std::size_t>(model->info.height) *
                      static_cast<std::size_t>(model->info.width);
}

}  // namespace

std::shared_ptr<const ModelImpl> OpenPlan(const std::string& path, const OpenOptions& options) {
  const Sidecar sidecar = ReadSidecar(path);
  if (options.check_hashes) {
    CheckSha256(path, sidecar.plan_sha256, sidecar.path, "copy or build it again");
  }
  const int major = Numbers(sidecar.tensorrt)[0];
  if (major != NV_TENSORRT_MAJOR && !sidecar.version_compatible) {
    RefuseMissing(path + " was built by TensorRT " + sidecar.tensorrt + "; this library serves TensorRT " +
                      std::to_string(NV_TENSORRT_MAJOR),
                  "build the library with the headers of TensorRT " + std::to_string(major) + " (TENSORRT_ROOT)");
  }
  const std::lock_guard<std::mutex> lock(LoadMutex());
  TensorRt& trt = LoadTensorRt(options.runtime_library);
  const CudaDevice& device = CudaDevice::Get(options.device_id);
  CheckHost(path, sidecar, trt, device);
  const CudaDevice::Active active(device);
  if (!sidecar.plugin.empty()) LoadPlugin(&trt, FindPlugin(sidecar, path, options));
  auto model = std::make_shared<TrtModel>(device);
  model->path = path;
  model->cuda_graph = options.cuda_graph;
  model->version = trt.version;
  model->trt.reset(static_cast<nvinfer1::IRuntime*>(trt.create_runtime(&model->log, NV_TENSORRT_VERSION)));
  if (model->trt == nullptr)
    RefuseMissing("TensorRT " + trt.version + " cannot start: " + model->log.TakeErrors(), kBuildAgain);
#if NV_TENSORRT_MAJOR >= 9
  // A version-compatible plan brings host code along; it is the file the user named, its hash checked.
  if (sidecar.version_compatible) model->trt->setEngineHostCodeAllowed(true);
#endif
  model->engine = model->Deserialize();
  ReadNodes(model.get(), sidecar);
  model->runtime = "tensorrt " + trt.version + " on " + device.name() + ", " +
                   (sidecar.plugin.empty() ? "function body" : "vim plugin");
  return model;
}

std::string TensorRtFeature() {
  return "TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + " (built with " + std::to_string(NV_TENSORRT_MAJOR) + "." +
         std::to_string(NV_TENSORRT_MINOR) + ")";
}

}  // namespace vimdeploy
