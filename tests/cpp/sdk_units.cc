// The parts of the SDK that its header does not show, for tests/cpp/test_sdk.py.
//
//   json FILE     "ok", or why not
//   sha256 FILE
//   narrow half|bfloat16     float32 on stdin to uint16 on stdout
//   widen half|bfloat16      and back
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../sdk/src/element.h"
#include "../../sdk/src/json.h"
#include "../../sdk/src/sha256.h"

namespace {

template <typename T>
std::vector<T> ReadStdin() {
  const std::string bytes{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  const auto* const values = reinterpret_cast<const T*>(bytes.data());
  return {values, values + bytes.size() / sizeof(T)};
}

template <typename T>
void WriteStdout(const std::vector<T>& values) {
  std::cout.write(reinterpret_cast<const char*>(values.data()),
                  static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// Numbers and strings are printed again, so that their values are compared and not only their form.
void Print(const vimdeploy::Json& json) {
  switch (json.type()) {
    case vimdeploy::Json::Type::kNumber:
      std::cout.precision(17);
      std::cout << "number " << json.AsNumber() << '\n';
      break;
    case vimdeploy::Json::Type::kString:
      std::cout << "string " << json.AsString() << '\n';
      break;
    case vimdeploy::Json::Type::kArray:
      for (const auto& item : json.AsArray()) Print(item);
      break;
    case vimdeploy::Json::Type::kObject:
      for (const auto& [key, value] : json.AsObject()) {
        std::cout << "key " << key << '\n';
        Print(value);
      }
      break;
    default:
      break;
  }
}

int Main(const std::string& command, const std::string& argument) {
  if (command == "sha256") {
    std::cout << vimdeploy::Sha256OfFile(argument) << '\n';
    return 0;
  }
  if (command == "json") {
    std::ifstream file(argument, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    Print(vimdeploy::Json::Parse(text));
    return 0;
  }
  const auto element = argument == "half" ? vimdeploy::Element::kHalf : vimdeploy::Element::kBfloat16;
  if (command == "narrow") {
    const auto wide = ReadStdin<float>();
    std::vector<std::uint16_t> narrow(wide.size());
    vimdeploy::FromFloat(wide.data(), wide.size(), element, narrow.data());
    WriteStdout(narrow);
    return 0;
  }
  if (command == "widen") {
    const auto narrow = ReadStdin<std::uint16_t>();
    std::vector<float> wide(narrow.size());
    vimdeploy::ToFloat(narrow.data(), narrow.size(), element, wide.data());
    WriteStdout(wide);
    return 0;
  }
  return 64;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 64;
  try {
    return Main(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cout << "refused: " << error.what() << '\n';
    return 1;
  }
}
