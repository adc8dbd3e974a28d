#include "sidecar.h"

#include <stdexcept>

#include "metadata.h"
#include "refuse.h"

namespace vimdeploy {
namespace {

constexpr int kFormat = 1;
constexpr const char* kBuildAgain = "build it again with `vimdeploy build-engine`";

}  // namespace

Sidecar ReadSidecar(const std::string& plan) {
  Sidecar sidecar;
  sidecar.path = plan + ".json";
  if (!IsFile(sidecar.path)) {
    RefuseInput(plan + " has no " + NameOf(sidecar.path) + " beside it, which says what it was built for",
                "copy it from where the plan was built, or " + std::string(kBuildAgain));
  }
  const Json json = ReadJsonFile(sidecar.path, kBuildAgain);
  try {
    if (json.At("format").AsInt() != kFormat) {
      RefuseInput(sidecar.path + " is of format " + std::to_string(json.At("format").AsInt()) +
                      "; this library reads " + std::to_string(kFormat),
                  kBuildAgain);
    }
    const Json& runtime = json.At("runtime");
    if (runtime.At("name").AsString() != "tensorrt") {
      RefuseInput(plan + " is an engine for " + runtime.At("name").AsString() + ", which this library does not load",
                  "build it with `vimdeploy build-engine --runtime tensorrt`");
    }
    sidecar.tensorrt = runtime.At("version").AsString();
    sidecar.plan_sha256 = json.At("plan").At("sha256").AsString();
    sidecar.version_compatible = json.At("version_compatible").AsBool();
    sidecar.sm = json.At("device").At("sm").AsInt();
    if (const Json& plugin = json.At("plugin"); !plugin.is_null()) {
      const std::string& file = plugin.At("file").AsString();
      sidecar.plugin = file.empty() || file[0] == '/' ? file : FolderOf(plan) + "/" + file;
      sidecar.plugin_sha256 = plugin.At("sha256").AsString();
    }
    for (const auto& [key, value] : json.At("model").AsObject()) sidecar.props[key] = value.AsString();
  } catch (const std::invalid_argument& error) {
    RefuseInput(sidecar.path + " is damaged (" + error.what() + ")", kBuildAgain);
  }
  return sidecar;
}

}  // namespace vimdeploy
