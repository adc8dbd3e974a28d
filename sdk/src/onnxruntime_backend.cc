// .onnx files through ONNX Runtime's C interface. The C++ one keeps its table of functions in a variable that a program
// which uses ONNX Runtime itself would share with us.
#include <onnxruntime_c_api.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "backend.h"
#include "element.h"
#include "library.h"
#include "metadata.h"
#include "refuse.h"

namespace vimdeploy {
namespace {

// The interface asked for, whatever the headers offer: also the oldest that the op library runs in.
constexpr std::uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime 1.21 or newer are needed");

constexpr const char* kOpLibrary = "libvimdeploy_ort.so";

// ONNX Runtime's log goes to the program's stderr, and repeats what our errors say.
constexpr OrtLoggingLevel kLogging = ORT_LOGGING_LEVEL_FATAL;

// One loaded libonnxruntime. Never freed: its own statics would be gone before ours.
struct Ort {
  const OrtApi* api = nullptr;
  OrtEnv* env = nullptr;
  std::string version;

  // Throws kInput with what was being done and ONNX Runtime's words, and the status is released.
  void Check(OrtStatus* status, const std::string& doing, const std::string& hint) const {
    if (status != nullptr) RefuseInput(doing + ": " + Message(status), hint);
  }

  // The first line of the message; releases the status.
  std::string Message(OrtStatus* status) const {
    std::string text = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    return text.substr(0, text.find('\n'));
  }
};

// Owns what one of the API's Release functions frees.
template <typename T>
class Owned {
 public:
  explicit Owned(void(ORT_API_CALL* release)(T*)) : release_(release) {}
  ~Owned() { release_(value_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  T** out() { return &value_; }
  T* get() const { return value_; }

 private:
  void(ORT_API_CALL* release_)(T*);
  T* value_ = nullptr;
};

constexpr const char* kInstall =
    "install it (an ONNX Runtime release, or the libonnxruntime.so.* inside the onnxruntime wheel) and let "
    "VIMDEPLOY_ONNXRUNTIME name the file";

const Ort& LoadOrt(const std::string& path) {
  static std::mutex mutex;
  static auto* const loaded = new std::map<void*, Ort>;
  const std::lock_guard<std::mutex> lock(mutex);
  const Library library = LoadLibrary(
      {"ONNX Runtime", path, "VIMDEPLOY_ONNXRUNTIME", {"libonnxruntime.so", "libonnxruntime.so.1"}, kInstall});
  if (const auto found = loaded->find(library.handle); found != loaded->end()) return found->second;
  using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();
  const auto get = reinterpret_cast<GetApiBase>(library.Symbol("OrtGetApiBase"));
  if (get == nullptr) RefuseMissing(library.name + " is not ONNX Runtime: it has no OrtGetApiBase", kInstall);
  Ort ort;
  ort.version = get()->GetVersionString();
  ort.api = get()->GetApi(kApiVersion);
  if (ort.api == nullptr)
    RefuseMissing(library.name + " is ONNX Runtime " + ort.version + "; 1.21 or newer is needed", "upgrade it");
  if (OrtStatus* const status = ort.api->CreateEnv(kLogging, "vimdeploy", &ort.env))
    RefuseMissing("ONNX Runtime " + ort.version + " cannot start: " + ort.Message(status), "reinstall it");
  return loaded->emplace(library.handle, ort).first->second;
}

struct Node {
  std::string name;
  Element element = Element::kFloat;
  std::vector<std::int64_t> shape;
};

Element ElementOf(ONNXTensorElementDataType type, const std::string& path, const std::string& name) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return Element::kFloat;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return Element::kHalf;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return Element::kBfloat16;
    default:
      RefuseInput(path + ": " + name + " is neither float, float16 nor bfloat16", "export it again");
  }
}

class OrtModel : public ModelImpl {
 public:
  explicit OrtModel(const Ort& runtime) : ort(runtime), session(runtime.api->ReleaseSession) {}

  std::unique_ptr<ContextImpl> NewContext(void* stream) const override;

  const Ort& ort;
  Owned<OrtSession> session;
  Node input;
  std::vector<Node> outputs;
};

class OrtContext : public ContextImpl {
 public:
  explicit OrtContext(const OrtModel& model) : model_(model), memory_(model.ort.api->ReleaseMemoryInfo) {
    model.ort.Check(model.ort.api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, memory_.out()),
                    "ONNX Runtime gives no memory", "free some");
  }

  void Run(const float* images, std::int64_t batch, std::vector<Tensor>* outputs) override {
    const Ort& ort = model_.ort;
    const std::string doing = "ONNX Runtime could not run the model on a batch of " + std::to_string(batch);
    const std::string hint = "try a smaller batch, or check the file with `vimdeploy verify parity`";
    const ModelInfo& info = model_.info;
    const std::int64_t shape[] = {batch, info.channels, info.height, info.width};
    const auto count = static_cast<std::size_t>(batch) * static_cast<std::size_t>(info.channels) *
                       static_cast<std::size_t>(info.height) * static_cast<std::size_t>(info.width);
    const std::size_t element = SizeOf(model_.input.element);
    void* data = const_cast<float*>(images);  // an input: ONNX Runtime only reads it
    if (model_.input.element != Element::kFloat) {
      narrow_.resize(count);
      FromFloat(images, count, model_.input.element, narrow_.data());
      data = narrow_.data();
    }
    Owned<OrtValue> input(ort.api->ReleaseValue);
    ort.Check(ort.api->CreateTensorWithDataAsOrtValue(memory_.get(), data, count * element, shape, 4,
                                                      OnnxType(model_.input.element), input.out()),
              doing, hint);
    std::vector<const char*> names;
    for (const Node& node : model_.outputs) names.push_back(node.name.c_str());
    const char* const input_name = model_.input.name.c_str();
    const OrtValue* const input_value = input.get();
    Values values(ort, names.size());
    ort.Check(ort.api->Run(model_.session.get(), nullptr, &input_name, &input_value, 1, names.data(), names.size(),
                           values.data()),
              doing, hint);
    outputs->resize(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
      Tensor& output = (*outputs)[i];
      output.name = names[i];
      Owned<OrtTensorTypeAndShapeInfo> type(ort.api->ReleaseTensorTypeAndShapeInfo);
      std::size_t rank = 0;
      std::size_t size = 0;
      void* from = nullptr;
      ort.Check(ort.api->GetTensorTypeAndShape(values.data()[i], type.out()), doing, hint);
      ort.Check(ort.api->GetDimensionsCount(type.get(), &rank), doing, hint);
      output.shape.resize(rank);
      ort.Check(ort.api->GetDimensions(type.get(), output.shape.data(), rank), doing, hint);
      ort.Check(ort.api->GetTensorShapeElementCount(type.get(), &size), doing, hint);
      ort.Check(ort.api->GetTensorMutableData(values.data()[i], &from), doing, hint);
      output.values.resize(size);
      ToFloat(from, size, model_.outputs[i].element, output.values.data());
    }
  }

  void Enqueue(const void*, std::int64_t, const std::vector<void*>&, void*) override {
    RefuseInput("Enqueue takes device memory, and an .onnx model runs through ONNX Runtime", "use Run, or a .plan");
  }

 private:
  // What Run allocates for us.
  class Values {
   public:
    Values(const Ort& ort, std::size_t count) : ort_(ort), values_(count) {}
    ~Values() {
      for (OrtValue* const value : values_) ort_.api->ReleaseValue(value);
    }
    Values(const Values&) = delete;
    Values& operator=(const Values&) = delete;
    OrtValue** data() { return values_.data(); }

   private:
    const Ort& ort_;
    std::vector<OrtValue*> values_;
  };

  static ONNXTensorElementDataType OnnxType(Element element) {
    if (element == Element::kFloat) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return element == Element::kHalf ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  }

  const OrtModel& model_;
  Owned<OrtMemoryInfo> memory_;
  std::vector<std::uint16_t> narrow_;
};

std::unique_ptr<ContextImpl> OrtModel::NewContext(void*) const { return std::make_unique<OrtContext>(*this); }

// The op library to register, or "" with `notice` saying why the function body must do.
std::string FindOpLibrary(const OpenOptions& options, std::string* notice) {
  if (options.op_library == "off") return "";
  if (!options.op_library.empty()) {
    if (!IsFile(options.op_library))
      RefuseMissing("the op library " + options.op_library + " is not a file",
                    "name the built " + std::string(kOpLibrary));
    return options.op_library;
  }
  const char* const variable = std::getenv("VIMDEPLOY_ORT_LIBRARY");
  if (variable != nullptr && *variable != '\0') {
    if (!IsFile(variable))
      RefuseMissing("VIMDEPLOY_ORT_LIBRARY names " + std::string(variable) + ", which is not a file",
                    "correct or unset it");
    return variable;
  }
  const std::string folder = OwnFolder();
  if (const std::string beside = folder + "/" + kOpLibrary; !folder.empty() && IsFile(beside)) return beside;
  *notice = "Running the function body, which is slower: no " + std::string(kOpLibrary) + " in " +
            (folder.empty() ? "this program's folder" : folder) +
            " (to mend it: let VIMDEPLOY_ORT_LIBRARY name the file)";
  return "";
}

void AddCuda(const Ort& ort, OrtSessionOptions* session_options, int device_id) {
  const std::string doing = "ONNX Runtime " + ort.version + " cannot use CUDA device " + std::to_string(device_id);
  const std::string hint = "install the GPU build of ONNX Runtime, CUDA and cuDNN, or run on Device::kCpu";
  OrtCUDAProviderOptionsV2* raw = nullptr;
  if (OrtStatus* const status = ort.api->CreateCUDAProviderOptions(&raw))
    RefuseMissing(doing + ": " + ort.Message(status), hint);
  const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(ort.api->ReleaseCUDAProviderOptions)> cuda(
      raw, ort.api->ReleaseCUDAProviderOptions);
  // TensorFloat-32 would cost what verify measured.
  const std::string id = std::to_string(device_id);
  const char* const keys[] = {"device_id", "use_tf32"};
  const char* const values[] = {id.c_str(), "0"};
  OrtStatus* status = ort.api->UpdateCUDAProviderOptions(raw, keys, values, 2);
  if (status == nullptr) status = ort.api->SessionOptionsAppendExecutionProvider_CUDA_V2(session_options, raw);
  if (status != nullptr) RefuseMissing(doing + ": " + ort.Message(status), hint);
}

// Whether this processor's quickest int8 products are wrong: x86-64 without VNNI adds pairs of them in 16 bits, which
// overflow. ONNX Runtime has a slower way that does not, to be asked for only there.
bool Int8Overflows() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool avx512_vnni = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 11 & 1U) != 0;
  const bool avx_vnni = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1U) != 0;
  return !avx512_vnni && !avx_vnni;
#else
  return false;
#endif
}

[[noreturn]] void RefuseSession(const std::string& text, const std::string& path, const std::string& op_library,
                                const std::string& notice) {
  if (text.find("is not a registered function/op") != std::string::npos && text.find("vim") != std::string::npos) {
    if (!op_library.empty()) {
      RefuseMissing("the op library " + op_library + " lacks an operator of " + path + ": " + text,
                    "use the library of the vimdeploy version that made the file, or export again");
    }
    const std::string what = path + " carries no function body for its vim:: operators, and no op library is loaded";
    if (notice.empty()) RefuseInput(what, "run it with the op library, or export it with --fallback scan");
    RefuseMissing(what, "let VIMDEPLOY_ORT_LIBRARY name " + std::string(kOpLibrary) +
                            ", or export the model with --fallback scan");
  }
  RefuseInput("ONNX Runtime cannot load " + path + ": " + text, "export it again with `vimdeploy export CKPT`");
}

Node ReadNode(const Ort& ort, OrtTypeInfo* type, std::string name, const std::string& path) {
  Node node;
  node.name = std::move(name);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  const std::string doing = path + ": " + node.name + " cannot be read";
  ort.Check(ort.api->CastTypeInfoToTensorInfo(type, &tensor), doing, "export it again");
  if (tensor == nullptr) RefuseInput(path + ": " + node.name + " is not a tensor", "export it again");
  ONNXTensorElementDataType element;
  ort.Check(ort.api->GetTensorElementType(tensor, &element), doing, "export it again");
  node.element = ElementOf(element, path, node.name);
  std::size_t rank = 0;
  ort.Check(ort.api->GetDimensionsCount(tensor, &rank), doing, "export it again");
  node.shape.resize(rank);
  ort.Check(ort.api->GetDimensions(tensor, node.shape.data(), rank), doing, "export it again");
  return node;
}

void ReadNodes(OrtModel* model, const std::string& path) {
  const Ort& ort = model->ort;
  const std::string doing = path + ": its inputs and outputs cannot be read";
  OrtAllocator* allocator = nullptr;  // ONNX Runtime's own, not ours to release
  ort.Check(ort.api->GetAllocatorWithDefaultOptions(&allocator), doing, "reinstall ONNX Runtime");
  const auto take = [&](char* text) {
    std::string copy = text;
    ort.Check(ort.api->AllocatorFree(allocator, text), doing, "reinstall ONNX Runtime");
    return copy;
  };
  OrtSession* const session = model->session.get();
  std::size_t inputs = 0;
  std::size_t outputs = 0;
  ort.Check(ort.api->SessionGetInputCount(session, &inputs), doing, "export it again");
  ort.Check(ort.api->SessionGetOutputCount(session, &outputs), doing, "export it again");
  if (inputs != 1 || outputs < 1) {
    RefuseInput(path + " has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                    " outputs; a Vim has one input, the images",
                "export it again with `vimdeploy export CKPT`");
  }
  char* name = nullptr;
  Owned<OrtTypeInfo> type(ort.api->ReleaseTypeInfo);
  ort.Check(ort.api->SessionGetInputName(session, 0, allocator, &name), doing, "export it again");
  const std::string input_name = take(name);
  ort.Check(ort.api->SessionGetInputTypeInfo(session, 0, type.out()), doing, "export it again");
  model->input = ReadNode(ort, type.get(), input_name, path);
  for (std::size_t i = 0; i < outputs; ++i) {
    Owned<OrtTypeInfo> output_type(ort.api->ReleaseTypeInfo);
    ort.Check(ort.api->SessionGetOutputName(session, i, allocator, &name), doing, "export it again");
    const std::string output_name = take(name);
    ort.Check(ort.api->SessionGetOutputTypeInfo(session, i, output_type.out()), doing, "export it again");
    model->outputs.push_back(ReadNode(ort, output_type.get(), output_name, path));
  }

  Owned<OrtModelMetadata> metadata(ort.api->ReleaseModelMetadata);
  ort.Check(ort.api->SessionGetModelMetadata(session, metadata.out()), doing, "export it again");
  char** keys = nullptr;
  std::int64_t count = 0;
  ort.Check(ort.api->ModelMetadataGetCustomMetadataMapKeys(metadata.get(), allocator, &keys, &count), doing,
            "export it again");
  std::map<std::string, std::string> props;
  for (std::int64_t i = 0; i < count; ++i) {
    char* value = nullptr;
    ort.Check(ort.api->ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, keys[i], &value), doing,
              "export it again");
    std::string key = take(keys[i]);
    props[key] = take(value);
  }
  if (keys != nullptr) ort.Check(ort.api->AllocatorFree(allocator, keys), doing, "reinstall ONNX Runtime");
  model->info = InfoFromProps(std::move(props), path);
}

}  // namespace

std::shared_ptr<const ModelImpl> OpenOnnx(const std::string& path, const OpenOptions& options) {
  if (options.threads < 0) RefuseInput("threads is " + std::to_string(options.threads), "0 leaves it to ONNX Runtime");
  const Ort& ort = LoadOrt(options.runtime_library);
  if (options.check_hashes) CheckManifest(path);
  auto model = std::make_shared<OrtModel>(ort);
  const std::string op_library = FindOpLibrary(options, &model->notice);

  const std::string doing = "ONNX Runtime " + ort.version + " takes no session options";
  Owned<OrtSessionOptions> settings(ort.api->ReleaseSessionOptions);
  ort.Check(ort.api->CreateSessionOptions(settings.out()), doing, "reinstall it");
  ort.Check(ort.api->SetSessionLogSeverityLevel(settings.get(), kLogging), doing, "reinstall it");
  ort.Check(ort.api->SetIntraOpNumThreads(settings.get(), options.threads), doing, "reinstall it");
  if (Int8Overflows()) {
    ort.Check(ort.api->AddSessionConfigEntry(settings.get(), "session.x64quantprecision", "1"), doing, "reinstall it");
  }
  if (!op_library.empty()) {
    // A name without a slash would be looked for where the dynamic loader looks.
    const std::string file = op_library.find('/') == std::string::npos ? "./" + op_library : op_library;
    // ONNX Runtime unloads the library with its last session, and the ops it never frees would leak with each reload.
    LoadLibrary({"the op library", file, nullptr, {}, "rebuild it for this host, or run the function body instead"});
    if (OrtStatus* const status = ort.api->RegisterCustomOpsLibrary_V2(settings.get(), file.c_str())) {
      RefuseMissing(
          "ONNX Runtime " + ort.version + " could not load the op library " + op_library + ": " + ort.Message(status),
          "rebuild it for this host, or run the function body instead (op_library \"off\")");
    }
  }
  if (options.device == Device::kCuda) {
    AddCuda(ort, settings.get(), options.device_id);
  } else {
    // Its plan of a run's memory comes beside what the first run took and keeps: half as much again, and no faster.
    ort.Check(ort.api->DisableMemPattern(settings.get()), doing, "reinstall it");
  }
  if (OrtStatus* const status = ort.api->CreateSession(ort.env, path.c_str(), settings.get(), model->session.out()))
    RefuseSession(ort.Message(status), path, op_library, model->notice);
  ReadNodes(model.get(), path);

  const std::int64_t batch = CheckInputShape(model->input.shape, model->info, path);
  model->min_batch = batch < 0 ? 1 : batch;
  model->max_batch = batch < 0 ? std::numeric_limits<std::int64_t>::max() : batch;
  const auto fallback = model->info.props.find("vimdeploy.fallback");
  model->runtime =
      "onnxruntime " + ort.version + (options.device == Device::kCuda ? " CUDA" : " CPU") + ", " +
      (op_library.empty()
           ? "function body (" + (fallback == model->info.props.end() ? "?" : fallback->second) + "), no op library"
           : "vim op library");
  return model;
}

std::string OnnxRuntimeFeature() { return "ONNX Runtime >= 1." + std::to_string(kApiVersion); }

}  // namespace vimdeploy
