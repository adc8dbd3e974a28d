// What TensorRT's loadLibrary, trtexec --dynamicPlugins and ONNX Runtime's TensorRT provider look up. Nothing here
// calls into TensorRT: the registry's virtual table differs between 10 and 11, so one library for both must not touch
// it, and REGISTER_TENSORRT_PLUGIN would.
#include <atomic>
#include <cstdio>

#include "logging.h"
#include "plugin_v3.h"

namespace vim::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void LogError(const char* op, const std::string& layer, const std::string& text) noexcept {
  try {
    const std::string line = std::string("vim::") + op + " '" + layer + "': " + text;
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
  using vim::trt::kOps;
  static vim::trt::Creator creators[] = {vim::trt::Creator(kOps[0]), vim::trt::Creator(kOps[1]),
                                         vim::trt::Creator(kOps[2]), vim::trt::Creator(kOps[3])};
  static nvinfer1::IPluginCreatorInterface* const pointers[] = {&creators[0], &creators[1], &creators[2], &creators[3]};
  static_assert(sizeof(pointers) / sizeof(pointers[0]) == vim::trt::kOpCount, "one creator an op");
  count = vim::trt::kOpCount;
  return pointers;
}

VIM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { vim::trt::logger_finder.store(finder); }
