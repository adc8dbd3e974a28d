// What tests/cpp/test_sdk.py drives: one subcommand a question, answered on stdout.
//
//   decode IMAGE                         width and height as int32, then the pixels
//   preprocess H W RESIZE IMAGE          float32
//   info MODEL                           one "name value" a line
//   classify MODEL TOP_K IMAGE...        all images in one call; "index probability label" a line
//   run MODEL BATCH                      images of 0, 1/N, 2/N...; every output's name, shape and values
//   threads MODEL THREADS TURNS IMAGE... fails unless each thread, with its own context, sees what one thread sees
//   enqueue MODEL
//
// Environment: OPEN_OP_LIBRARY, OPEN_RUNTIME, OPEN_PLUGIN, OPEN_DEVICE (cuda), OPEN_UNCHECKED, OPEN_GRAPH fill in
// OpenOptions.
#include <vimdeploy/vimdeploy.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

using vimdeploy::Context;
using vimdeploy::Image;
using vimdeploy::Model;

namespace {

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : "";
}

Model Open(const std::string& path) {
  vimdeploy::OpenOptions options;
  options.op_library = Variable("OPEN_OP_LIBRARY");
  options.runtime_library = Variable("OPEN_RUNTIME");
  options.plugin_library = Variable("OPEN_PLUGIN");
  options.check_hashes = Variable("OPEN_UNCHECKED").empty();
  options.cuda_graph = !Variable("OPEN_GRAPH").empty();
  if (Variable("OPEN_DEVICE") == "cuda") options.device = vimdeploy::Device::kCuda;
  options.threads = 1;
  return Model::Open(path, options);
}

void Write(const void* data, std::size_t size) { std::fwrite(data, 1, size, stdout); }

std::vector<Image> ReadAll(const std::vector<std::string>& paths, std::size_t from) {
  std::vector<Image> images;
  for (std::size_t i = from; i < paths.size(); ++i) images.push_back(Image::Read(paths[i]));
  return images;
}

bool Same(const std::vector<vimdeploy::Prediction>& a, const std::vector<vimdeploy::Prediction>& b) {
  if (a.size() != b.size() || a.empty()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].index != b[i].index || a[i].probability != b[i].probability) return false;
  return true;
}

int Threads(const std::vector<std::string>& arguments) {
  const Model model = Open(arguments[1]);
  const std::vector<Image> images = ReadAll(arguments, 4);
  std::vector<std::vector<vimdeploy::Prediction>> expected;
  Context single(model);
  for (const Image& image : images) expected.push_back(single.Classify(image));
  std::atomic<int> compared{0};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < std::stoi(arguments[2]); ++t) {
    // The model by value: copies are handles, and the last one to go frees it.
    threads.emplace_back([&, model, t] {
      Context context(model);
      for (int turn = 0; turn < std::stoi(arguments[3]); ++turn) {
        const std::size_t i = static_cast<std::size_t>(t + turn) % images.size();
        wrong += !Same(context.Classify(images[i]), expected[i]);
        ++compared;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::cout << "compared " << compared << " wrong " << wrong << '\n';
  return wrong == 0 && compared > 0 ? 0 : 1;
}

int Info(const Model& model) {
  const vimdeploy::ModelInfo& info = model.info();
  std::cout << "features " << vimdeploy::Features() << "\nvariant " << info.variant << "\nprecision " << info.precision
            << "\noutput " << info.output << "\nchannels " << info.channels << "\nheight " << info.height << "\nwidth "
            << info.width << "\nclasses " << info.classes << "\nversion " << info.version << "\nresize "
            << info.preprocessing.resize << "\nmin_batch " << model.min_batch() << "\nmax_batch " << model.max_batch()
            << "\nprops " << info.props.size() << "\nruntime " << model.runtime() << "\nnotice " << model.notice()
            << '\n';
  for (const std::string& label : info.labels) std::cout << "label " << label << '\n';
  return 0;
}

int Run(const Model& model, std::int64_t batch) {
  const vimdeploy::ModelInfo& info = model.info();
  std::vector<float> images(static_cast<std::size_t>(batch * info.channels * info.height * info.width));
  for (std::size_t i = 0; i < images.size(); ++i) images[i] = static_cast<float>(i) / static_cast<float>(images.size());
  Context first(model);
  Context context = std::move(first);
  for (const vimdeploy::Tensor& output : context.Run(images.data(), batch)) {
    std::cout << output.name;
    for (const std::int64_t side : output.shape) std::cout << ' ' << side;
    std::cout.precision(9);
    for (const float value : output.values) std::cout << '\n' << value;
    std::cout << '\n';
  }
  return 0;
}

int Classify(const Model& model, const std::vector<std::string>& arguments) {
  Context context(model);
  for (const auto& predictions : context.Classify(ReadAll(arguments, 3), std::stoi(arguments[2])))
    for (const auto& guess : predictions)
      std::printf("%d %.9f %s\n", guess.index, guess.probability, guess.label.c_str());
  return 0;
}

int Decode(const std::string& path) {
  const Image image = Image::Read(path);
  const std::int32_t size[] = {image.width, image.height};
  Write(size, sizeof size);
  Write(image.pixels.data(), image.pixels.size());
  return 0;
}

int Preprocess(const std::vector<std::string>& arguments) {
  vimdeploy::Preprocessing preprocessing;
  preprocessing.height = std::stoi(arguments[1]);
  preprocessing.width = std::stoi(arguments[2]);
  preprocessing.resize = std::stoi(arguments[3]);
  preprocessing.mean = {0.485f, 0.456f, 0.406f};
  preprocessing.std = {0.229f, 0.224f, 0.225f};
  std::vector<float> out(preprocessing.count());
  vimdeploy::Preprocess(preprocessing, Image::Read(arguments[4]), out.data());
  Write(out.data(), out.size() * sizeof(float));
  return 0;
}

int Main(const std::vector<std::string>& arguments) {
  const std::string& command = arguments.at(0);
  if (command == "decode") return Decode(arguments.at(1));
  if (command == "preprocess" && arguments.size() == 5) return Preprocess(arguments);
  if (command == "threads") return Threads(arguments);
  const Model model = Open(arguments.at(1));
  if (command == "info") return Info(model);
  if (command == "classify") return Classify(model, arguments);
  if (command == "run") return Run(model, std::stoll(arguments.at(2)));
  if (command == "enqueue") {
    Context(model).Enqueue(nullptr, 1, {nullptr});
    return 0;
  }
  std::cerr << "unknown: " << command << '\n';
  return 64;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main({argv + 1, argv + argc});
  } catch (const vimdeploy::Error& error) {
    std::cerr << "Error: " << error.message() << "\nHint: " << error.hint() << '\n';
    return error.exit_code();
  }
}
