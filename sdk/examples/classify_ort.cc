// Classifies a picture with ONNX Runtime, and prints what `vimdeploy run` prints.
//
//   classify_ort IMAGE ONNX [cuda]
//
// ONNX is an .onnx file or the .vim folder around it. VIMDEPLOY_ONNXRUNTIME names libonnxruntime.so where the dynamic
// loader does not find it.
#include <vimdeploy/vimdeploy.h>

#include <cmath>
#include <cstdio>
#include <iostream>
#include <string>

namespace {

// One line a guess: "  93.1 %  ██████████████████████░░  tabby".
void Print(const std::string& image, const std::vector<vimdeploy::Prediction>& predictions) {
  constexpr int kBar = 24;
  std::cout << image << '\n';
  for (const auto& guess : predictions) {
    char percent[16];
    std::snprintf(percent, sizeof percent, "%5.1f %%", 100 * guess.probability);
    std::cout << percent << "  ";
    const int filled = static_cast<int>(std::nearbyint(guess.probability * kBar));
    for (int i = 0; i < kBar; ++i) std::cout << (i < filled ? "█" : "░");
    std::cout << "  " << guess.label << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4 || (argc == 4 && std::string(argv[3]) != "cuda")) {
    std::cerr << "Usage: classify_ort IMAGE ONNX [cuda]\n";
    return 2;
  }
  try {
    const auto image = vimdeploy::Image::Read(argv[1]);
    vimdeploy::OpenOptions options;
    if (argc == 4) options.device = vimdeploy::Device::kCuda;
    const auto model = vimdeploy::Model::Open(argv[2], options);
    if (!model.notice().empty()) std::cerr << model.notice() << '\n';
    vimdeploy::Context context(model);
    Print(argv[1], context.Classify(image));
  } catch (const vimdeploy::Error& error) {
    std::cerr << "Error: " << error.what() << '\n';
    return error.exit_code();
  }
}
