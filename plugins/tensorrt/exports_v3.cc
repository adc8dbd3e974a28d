// What TensorRT's loadLibrary, trtexec --dynamicPlugins and ONNX Runtime's TensorRT provider look up. Nothing here
// calls into TensorRT: the registry's virtual table differs between 10 and 11, so one library for both must not touch
// it, and REGISTER_TENSORRT_PLUGIN would.
#include <atomic>
#include <cstdio>

#include "logging.h"
#include "selective_scan_v3.h"

namespace vim::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void LogError(const std::string& layer, const std::string& text) noexcept {
  try {
    const std::string line = std::string("vim::SelectiveScan '") + layer + "': " + text;
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr)
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    else
      std::fprintf(stderr, "%s\n", line.c_str());
  } catch (...) {  // out of memory while reporting: the status still tells
  }
}

}  // namespace vim::trt

#define VIM_EXPORT extern "C" __attribute__((visibility("default")))

VIM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static vim::trt::SelectiveScanCreator selective_scan;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&selective_scan};
  count = 1;
  return creators;
}

VIM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { vim::trt::logger_finder.store(finder); }
