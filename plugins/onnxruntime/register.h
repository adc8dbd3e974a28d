// What the entry point of an op library does; each library has a file of its own that says which backends it has.
#ifndef VIM_ONNXRUNTIME_REGISTER_H_
#define VIM_ONNXRUNTIME_REGISTER_H_

#include <initializer_list>

#include "op.h"

namespace vim::ort {

// Adds the ops to a session's options. `library` is the file's name, for messages. The domain is made by a process's
// first call and serves every session.
OrtStatus* Register(OrtSessionOptions* options, const OrtApiBase* base, const char* library,
                    std::initializer_list<const Backend*> backends) noexcept;

}  // namespace vim::ort

#endif  // VIM_ONNXRUNTIME_REGISTER_H_
