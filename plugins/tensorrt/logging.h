// One line to TensorRT's logger, or to stderr where there is none.
#ifndef VIMDEPLOY_PLUGINS_TENSORRT_LOGGING_H_
#define VIMDEPLOY_PLUGINS_TENSORRT_LOGGING_H_

#include <string>

namespace vim::trt {

// "vim::OP 'layer': text".
void LogError(const char* op, const std::string& layer, const std::string& text) noexcept;

}  // namespace vim::trt

#endif  // VIMDEPLOY_PLUGINS_TENSORRT_LOGGING_H_
