// The public classes: which runtime a file goes to, and everything that does not depend on the runtime.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "backend.h"
#include "metadata.h"
#include "refuse.h"

namespace vimdeploy {
namespace {

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string Hinted(const std::string& message, const std::string& hint) {
  return hint.empty() ? message : message + " (" + hint + ")";
}

void CheckClassifier(const ModelInfo& info) {
  if (info.output != "logits" || info.classes == 0) {
    RefuseInput("the model puts out " + (info.output != "logits" ? info.output : std::string("features")) +
                    ", not class scores",
                "export the checkpoint with --output logits");
  }
  if (info.channels != 3)
    RefuseInput("the model reads " + std::to_string(info.channels) + " channels; images give 3 (RGB)", "use Run");
}

void CheckBatch(const ModelImpl& model, std::int64_t batch) {
  if (batch < model.min_batch || batch > model.max_batch) {
    RefuseInput("a batch of " + std::to_string(batch) + ", the model takes " + std::to_string(model.min_batch) +
                    " to " + std::to_string(model.max_batch),
                "split or fill up the batch, or make the model for it");
  }
}

std::vector<Prediction> Rank(const float* logits, const ModelInfo& info, int top_k) {
  const auto classes = static_cast<std::size_t>(info.classes);
  const double largest = *std::max_element(logits, logits + classes);
  double sum = 0;
  for (std::size_t i = 0; i < classes; ++i) sum += std::exp(logits[i] - largest);
  std::vector<int> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  order.resize(std::min(classes, static_cast<std::size_t>(top_k)));
  std::vector<Prediction> ranked;
  for (const int index : order) {
    const bool labelled = info.labels.size() == classes;
    ranked.push_back({index, labelled ? info.labels[static_cast<std::size_t>(index)] : std::to_string(index),
                      std::exp(logits[index] - largest) / sum});
  }
  return ranked;
}

}  // namespace

Error::Error(Kind kind, std::string message, std::string hint)
    : std::runtime_error(Hinted(message, hint)), kind_(kind), message_(std::move(message)), hint_(std::move(hint)) {}

Error::~Error() = default;

std::int64_t CheckInputShape(const std::vector<std::int64_t>& shape, const ModelInfo& info, const std::string& path) {
  const std::vector<std::int64_t> wanted = {info.channels, info.height, info.width};
  bool good = shape.size() == 4 && (shape[0] == -1 || shape[0] > 0);
  for (std::size_t i = 0; good && i < 3; ++i) good = shape[i + 1] == wanted[i] || shape[i + 1] == -1;
  if (!good) {
    std::string text;
    for (const std::int64_t side : shape)
      text += (text.empty() ? "" : ", ") + (side < 0 ? "any" : std::to_string(side));
    RefuseInput(path + " takes (" + text + "), its metadata says " + std::to_string(info.channels) + " channels of " +
                    std::to_string(info.height) + "x" + std::to_string(info.width) + " pixels",
                "export it again");
  }
  return shape[0];
}

Model::Model(std::shared_ptr<const ModelImpl> impl) : impl_(std::move(impl)) {}

Model Model::Open(const std::string& path, const OpenOptions& options) {
  std::string file = path;
  if (IsFolder(path)) {
    file = path + "/model.onnx";
    if (!IsFile(file)) RefuseInput(path + " holds no model.onnx", "make it again with `vimdeploy export CKPT`");
  }
  if (!IsFile(file)) RefuseInput(path + " does not exist", "make one with `vimdeploy export CKPT`");
  if (EndsWith(file, ".onnx")) return Model(OpenOnnx(file, options));
  if (EndsWith(file, ".plan")) return Model(OpenPlan(file, options));
  RefuseInput(path + " ends in neither .onnx nor .plan", "name a .vim folder, an .onnx or a .plan file");
}

const ModelInfo& Model::info() const { return impl_->info; }
const std::string& Model::notice() const { return impl_->notice; }
const std::string& Model::runtime() const { return impl_->runtime; }
std::int64_t Model::min_batch() const { return impl_->min_batch; }
std::int64_t Model::max_batch() const { return impl_->max_batch; }

Context::Context(const Model& model, void* stream) : model_(model.impl_), impl_(model_->NewContext(stream)) {}
Context::~Context() = default;
Context::Context(Context&&) noexcept = default;
// Not the default, which would free the old model before what runs on it.
Context& Context::operator=(Context&& other) noexcept {
  impl_ = std::move(other.impl_);
  model_ = std::move(other.model_);
  outputs_ = std::move(other.outputs_);
  return *this;
}

std::vector<Prediction> Context::Classify(const Image& image, int top_k) {
  return ClassifyAll(&image, 1, top_k).front();
}

std::vector<std::vector<Prediction>> Context::Classify(const std::vector<Image>& images, int top_k) {
  return ClassifyAll(images.data(), images.size(), top_k);
}

std::vector<std::vector<Prediction>> Context::ClassifyAll(const Image* images, std::size_t number, int top_k) {
  const ModelInfo& info = model_->info;
  CheckClassifier(info);
  if (top_k < 1) RefuseInput("top_k is " + std::to_string(top_k), "ask for at least 1");
  const std::size_t size = info.preprocessing.count();
  std::vector<std::vector<Prediction>> result;
  std::vector<float> batch;
  for (std::size_t start = 0; start < number;) {
    const auto left = static_cast<std::int64_t>(number - start);
    const std::int64_t count = std::min(left, model_->max_batch);
    const std::int64_t filled = std::max(count, model_->min_batch);
    batch.resize(static_cast<std::size_t>(filled) * size);
    for (std::int64_t i = 0; i < filled; ++i) {
      float* const to = batch.data() + static_cast<std::size_t>(i) * size;
      if (i < count) {
        Preprocess(info.preprocessing, images[start + static_cast<std::size_t>(i)], to);
      } else {
        std::copy_n(to - size, size, to);
      }
    }
    const std::vector<Tensor>& outputs = Run(batch.data(), filled);
    const auto named = std::find_if(outputs.begin(), outputs.end(), [](const Tensor& t) { return t.name == "logits"; });
    const Tensor& logits = named != outputs.end() ? *named : outputs.front();
    if (logits.shape != std::vector<std::int64_t>{filled, info.classes}) {
      RefuseInput("the model put out " + std::to_string(logits.values.size()) + " scores for " +
                      std::to_string(filled) + " images and " + std::to_string(info.classes) + " classes",
                  "export it again");
    }
    const auto classes = static_cast<std::size_t>(info.classes);
    const auto used = static_cast<std::size_t>(count) * classes;
    if (!std::all_of(logits.values.begin(), logits.values.begin() + static_cast<std::ptrdiff_t>(used),
                     [](float value) { return std::isfinite(value); })) {
      throw Error(Error::Kind::kCheck, "the model's scores are not finite (NaN or infinite) on " + model_->runtime,
                  "compare it with PyTorch: `vimdeploy verify parity`");
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
      result.push_back(Rank(logits.values.data() + i * classes, info, top_k));
    start += static_cast<std::size_t>(count);
  }
  return result;
}

const std::vector<Tensor>& Context::Run(const float* images, std::int64_t batch) {
  CheckBatch(*model_, batch);
  impl_->Run(images, batch, &outputs_);
  return outputs_;
}

void Context::Enqueue(const void* images, std::int64_t batch, const std::vector<void*>& outputs, void* stream) {
  CheckBatch(*model_, batch);
  impl_->Enqueue(images, batch, outputs, stream);
}

std::string Features() {
  std::string text;
  for (const std::string& feature : {OnnxRuntimeFeature(), TensorRtFeature()})
    if (!feature.empty()) text += (text.empty() ? "" : ", ") + feature;
  return text;
}

}  // namespace vimdeploy
