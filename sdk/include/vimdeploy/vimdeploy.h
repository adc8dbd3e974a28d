// vimdeploy: a Vision Mamba in a C++ program.
//
//   #include <vimdeploy/vimdeploy.h>
//   #include <iostream>
//
//   int main() {
//     try {
//       const auto model = vimdeploy::Model::Open("ckpt.vim");  // or an .onnx file, or a TensorRT .plan
//       vimdeploy::Context context(model);
//       for (const auto& guess : context.Classify(vimdeploy::Image::Read("cat.jpg")))
//         std::cout << guess.label << ' ' << guess.probability << '\n';
//     } catch (const vimdeploy::Error& error) {
//       std::cerr << error.what() << '\n';
//       return error.exit_code();
//     }
//   }
//
// The map, from simple to advanced:
//   Error           what every function throws, and nothing else (but for std::bad_alloc)
//   Image           8-bit RGB pixels, from a JPEG or PNG file or from memory
//   Preprocess      from an Image to the floats the model reads, as the model was evaluated
//   Model           a model file made ready by ONNX Runtime or TensorRT; what the file says about itself
//   Context         runs it: Classify, Run, Enqueue
//
// Threads. A Model is immutable once open: share it, or copies of it (they are handles to one thing), among any number
// of threads. A Context belongs to one thread at a time: one thread, one Context. Free functions may be called
// anywhere.
//
// Runtimes are loaded when a model asks for them, so a program starts, and says what is missing, on a host without
// them:
//   ONNX Runtime    OpenOptions::runtime_library, else the environment's VIMDEPLOY_ONNXRUNTIME, else libonnxruntime.so
//                   where the dynamic loader looks; 1.21 or newer
//   its op library  OpenOptions::op_library, else VIMDEPLOY_ORT_LIBRARY, else libvimdeploy_ort.so beside this library
//   TensorRT        OpenOptions::runtime_library, else VIMDEPLOY_TENSORRT, else libnvinfer.so.N, N being the major
//                   version this library was built for (Features says which)
//   its plugin      OpenOptions::plugin_library, else where the plan's .json saw it, beside the plan, what
//                   VIMDEPLOY_TRT_PLUGIN names, beside this library: the first that is the file the plan was built with
// A library once loaded stays loaded.
#ifndef VIMDEPLOY_VIMDEPLOY_H_
#define VIMDEPLOY_VIMDEPLOY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define VIMDEPLOY_API __attribute__((visibility("default")))

namespace vimdeploy {

// What went wrong, and what to do about it: what() is both, message() and hint() are the halves.
class VIMDEPLOY_API Error : public std::runtime_error {
 public:
  enum class Kind {
    kCheck,    // the model's scores are not finite
    kInput,    // an argument, a model file or an image is no good, or not made for this host
    kMissing,  // a runtime, a library or a device is not there, or a library is not the one that is needed
  };

  Error(Kind kind, std::string message, std::string hint);
  ~Error() override;

  Kind kind() const noexcept { return kind_; }
  const std::string& message() const noexcept { return message_; }
  const std::string& hint() const noexcept { return hint_; }
  // What a program might exit with, as the vimdeploy command does: 1, 2 and 3 in the order of Kind.
  int exit_code() const noexcept { return static_cast<int>(kind_) + 1; }

 private:
  Kind kind_;
  std::string message_;
  std::string hint_;
};

// An 8-bit RGB picture, rows from the top, without padding: pixels.size() is width * height * 3.
struct VIMDEPLOY_API Image {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> pixels;

  // A JPEG or PNG file. Colours are what the Python package sees: alpha dropped, EXIF orientation not applied, grey
  // repeated, 16-bit grey scaled. Throws kInput, naming the path, for a file that is missing, of another format,
  // damaged, truncated, or above 178,956,970 pixels.
  static Image Read(const std::string& path);
  // The same for a file's bytes; `name` stands for the path in messages.
  static Image Decode(const void* bytes, std::size_t size, const std::string& name = "image");
};

// How an image becomes model input. Read from the model file; a program has no need to make one.
struct Preprocessing {
  int height = 0;  // of the model's input
  int width = 0;
  // The shorter side of the frame that the image is scaled to cover before the middle is cut out of it; 0: an image of
  // the input's size is taken as it is, any other is scaled to cover the input.
  int resize = 0;
  std::array<float, 3> mean{};  // of channels R, G, B, on a scale of 0 to 1
  std::array<float, 3> std{};

  // How many floats an image becomes.
  std::size_t count() const {
    return std::size_t{3} * static_cast<std::size_t>(height) * static_cast<std::size_t>(width);
  }
};

// Scales (antialiased bicubic, in 8 bits, as Pillow does), cuts and normalises `image` into out[0 .. count() - 1], laid
// out (3, height, width). Equals the Python package's preprocessing to the bit. Throws kInput for an image whose pixels
// do not match its size, or so thin that scaling it would need more than 178,956,970 pixels.
VIMDEPLOY_API void Preprocess(const Preprocessing& preprocessing, const Image& image, float* out);

enum class Device { kCpu, kCuda };

struct OpenOptions {
  Device device = Device::kCpu;  // for .onnx; a .plan runs on CUDA whatever this says
  int device_id = 0;             // which CUDA device
  int threads = 0;               // of ONNX Runtime for one run; 0: its own choice
  std::string runtime_library;   // libonnxruntime.so or libnvinfer.so; empty: see the top of this file
  std::string op_library;        // libvimdeploy_ort.so; empty: see the top; "off": the function body in the file
  std::string plugin_library;    // libvimdeploy_trt.so; empty: see the top
  // .plan only: Context::Run records the work of each batch size once and replays it, which spares a small batch most
  // of its launches. Before TensorRT 10 only the last batch size stays recorded.
  bool cuda_graph = false;
  // Read whole files to compare their SHA-256 with what the manifest or the plan's .json says. Off, a damaged plan may
  // bring the process down.
  bool check_hashes = true;
};

// What a model file says about itself (`vimdeploy export` wrote it).
struct ModelInfo {
  std::string variant;
  std::string precision;  // fp32 | fp16 | bf16
  std::string output;     // logits | features | tokens
  std::string checkpoint_sha256;
  std::string version;  // of vimdeploy
  int channels = 0;
  int height = 0;
  int width = 0;
  int classes = 0;                  // 0: no classifier head
  std::vector<std::string> labels;  // one a class, or none
  Preprocessing preprocessing;
  std::map<std::string, std::string> props;  // all the file's metadata, as written
};

class ModelImpl;
class ContextImpl;

// A model file made ready by a runtime. Copies share one model; see "Threads" at the top.
class VIMDEPLOY_API Model {
 public:
  // `path`: a .vim folder (its model.onnx), an .onnx file, or a .plan file with its .json beside it.
  //
  // Throws kInput when the file is missing, damaged, of another make, not what its manifest or .json describes, or an
  // .onnx that needs the op library while op_library is "off"; kMissing when the runtime, a library or the device is
  // not there or not the right one. Nothing falls back in silence: without the op library an .onnx runs its function
  // body, if it has one, and notice() says so; a library that was named must load.
  static Model Open(const std::string& path, const OpenOptions& options = {});

  const ModelInfo& info() const;
  // A sentence the user should see (a slower way was taken, and why), or empty.
  const std::string& notice() const;
  // The runtime, its version, the device and how the scan is computed, for logs.
  const std::string& runtime() const;
  // The batches Run takes. An .onnx of any batch size says 1 and the largest int64.
  std::int64_t min_batch() const;
  std::int64_t max_batch() const;

 private:
  friend class Context;
  explicit Model(std::shared_ptr<const ModelImpl> impl);
  std::shared_ptr<const ModelImpl> impl_;
};

// One line of a ranked list.
struct Prediction {
  int index = 0;       // of the output
  std::string label;   // the index in digits when the model has no labels
  double probability;  // softmax over all classes
};

// An output of the model, widened to float.
struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// What one thread needs to run a model: buffers and, for TensorRT, the activations. Keeps the model alive.
class VIMDEPLOY_API Context {
 public:
  // `stream`: a cudaStream_t or CUstream that a .plan's work goes to, the caller's to keep alive; null makes one.
  // Ignored for .onnx. Throws kMissing when device memory does not suffice.
  explicit Context(const Model& model, void* stream = nullptr);
  ~Context();
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;

  // The `top_k` likeliest classes, best first (all of them when there are fewer). Several images make one batch, split
  // or filled up where the model's batch range asks for it. Throws kInput for a model that does not classify RGB
  // images, kCheck when a score is not finite, and what Preprocess and Run throw.
  std::vector<Prediction> Classify(const Image& image, int top_k = 5);
  std::vector<std::vector<Prediction>> Classify(const std::vector<Image>& images, int top_k = 5);

  // `images`: batch x channels x height x width floats, normalised (Preprocess); narrowed where the model reads fp16.
  // Returns every output. It is this context's own buffer: the next call overwrites it, copy what you keep. Returns
  // when the outputs are there. Throws kInput for a batch outside min_batch .. max_batch or a run that the runtime
  // refuses.
  const std::vector<Tensor>& Run(const float* images, std::int64_t batch);

  // Advanced, .plan only: device memory in and out, in the plan's own types, no copy and no synchronisation. `outputs`
  // holds a device pointer for each output in the order of Run's result; they must be of the sizes that Run would
  // return. The work is queued on `stream`, or on the context's own when null. Throws kInput for an .onnx, and as Run
  // does.
  void Enqueue(const void* images, std::int64_t batch, const std::vector<void*>& outputs, void* stream = nullptr);

 private:
  std::vector<std::vector<Prediction>> ClassifyAll(const Image* images, std::size_t number, int top_k);

  std::shared_ptr<const ModelImpl> model_;  // outlives impl_
  std::unique_ptr<ContextImpl> impl_;
  std::vector<Tensor> outputs_;
};

// What this build of the library can run, e.g. "ONNX Runtime >= 1.21, TensorRT 10 (built with 10.14)".
VIMDEPLOY_API std::string Features();

}  // namespace vimdeploy

#endif  // VIMDEPLOY_VIMDEPLOY_H_
