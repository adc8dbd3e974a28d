#include "metadata.h"

#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "refuse.h"
#include "sha256.h"

namespace vimdeploy {
namespace {

constexpr const char* kExportAgain = "export it again with `vimdeploy export CKPT`";

const std::string& Prop(const std::map<std::string, std::string>& props, const std::string& key) {
  const auto found = props.find("vimdeploy." + key);
  if (found == props.end()) throw std::invalid_argument("no vimdeploy." + key);
  return found->second;
}

std::array<float, 3> Triple(const Json& json) {
  if (json.AsArray().size() != 3) throw std::invalid_argument("mean and std take 3 numbers");
  std::array<float, 3> values;
  for (std::size_t i = 0; i < 3; ++i) values[i] = static_cast<float>(json.AsArray()[i].AsNumber());
  if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); }))
    throw std::invalid_argument("mean or std is not finite");
  return values;
}

std::pair<int, int> HeightAndWidth(const Json& json) {
  const auto& sides = json.AsArray();
  if (sides.size() != 2 || sides[0].AsInt() < 1 || sides[1].AsInt() < 1)
    throw std::invalid_argument("img_size takes a height and a width");
  return {sides[0].AsInt(), sides[1].AsInt()};
}

Preprocessing ReadPreprocessing(const Json& json) {
  Preprocessing p;
  std::tie(p.height, p.width) = HeightAndWidth(json.At("img_size"));
  p.resize = json.At("resize").is_null() ? 0 : json.At("resize").AsInt();
  p.mean = Triple(json.At("mean"));
  p.std = Triple(json.At("std"));
  if (!json.At("resize").is_null() && p.resize < std::min(p.height, p.width))
    throw std::invalid_argument("resize " + std::to_string(p.resize) + " is less than the model's input");
  if (*std::min_element(p.std.begin(), p.std.end()) <= 0) throw std::invalid_argument("std is not above 0");
  if (json.At("interpolation").AsString() != "bicubic")
    throw std::invalid_argument("interpolation " + json.At("interpolation").AsString() + ": only bicubic is known");
  // A step this version does not know would be left out in silence.
  for (const auto& [key, value] : json.AsObject())
    if (key != "img_size" && key != "resize" && key != "mean" && key != "std" && key != "interpolation")
      throw std::invalid_argument("unknown: " + key);
  return p;
}

}  // namespace

ModelInfo InfoFromProps(std::map<std::string, std::string> props, const std::string& source) {
  ModelInfo info;
  try {
    info.variant = Prop(props, "variant");
    info.precision = Prop(props, "precision");
    info.output = Prop(props, "output");
    info.checkpoint_sha256 = Prop(props, "checkpoint_sha256");
    info.version = Prop(props, "version");
    const Json config = Json::Parse(Prop(props, "config"));
    std::tie(info.height, info.width) = HeightAndWidth(config.At("img_size"));
    info.channels = config.At("in_chans").AsInt();
    info.classes = config.At("num_classes").AsInt();
    if (info.channels < 1 || info.classes < 0) throw std::invalid_argument("in_chans or num_classes is out of range");
    const Json labels = Json::Parse(Prop(props, "labels"));
    for (const Json& label : labels.AsArray()) info.labels.push_back(label.AsString());
    info.preprocessing = ReadPreprocessing(Json::Parse(Prop(props, "preprocessing")));
    if (info.preprocessing.height != info.height || info.preprocessing.width != info.width)
      throw std::invalid_argument("config and preprocessing give two image sizes");
  } catch (const std::invalid_argument& error) {
    RefuseInput(source + " does not say what it is (" + error.what() + ")", kExportAgain);
  }
  info.props = std::move(props);
  return info;
}

Json ReadJsonFile(const std::string& path, const std::string& hint) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) RefuseInput(path + " cannot be read", hint);
  try {
    Json json = Json::Parse(text);
    (void)json.AsObject();
    return json;
  } catch (const std::invalid_argument& error) {
    RefuseInput(path + " is damaged (" + error.what() + ")", hint);
  }
}

bool IsFile(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool IsFolder(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::string FolderOf(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string NameOf(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

void CheckManifest(const std::string& model) {
  const std::string path = FolderOf(model) + "/manifest.json";
  if (!IsFile(path)) return;
  const Json manifest = ReadJsonFile(path, "export again");
  const Json* const files = manifest.Find("files");
  const Json* const file = files != nullptr ? files->Find(NameOf(model)) : nullptr;
  const Json* const sha256 = file != nullptr ? file->Find("sha256") : nullptr;
  if (sha256 == nullptr || sha256->type() != Json::Type::kString) return;
  CheckSha256(model, sha256->AsString(), "its manifest.json",
              "make it again, or remove the manifest if the change is yours");
}

std::string Sha256Of(const std::string& path) {
  try {
    return Sha256OfFile(path);
  } catch (const std::runtime_error& error) {
    RefuseInput(error.what(), "check its permissions");
  }
}

void CheckSha256(const std::string& path, const std::string& wanted, const std::string& who, const std::string& hint) {
  if (Sha256Of(path) != wanted)
    RefuseInput(path + " is not the file that " + who + " describes (SHA-256 differs): it was changed or damaged",
                hint);
}

}  // namespace vimdeploy
