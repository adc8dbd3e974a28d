// Short names for what this library throws. Each: what is wrong, and what to do about it.
#ifndef VIMDEPLOY_SDK_REFUSE_H_
#define VIMDEPLOY_SDK_REFUSE_H_

#include <string>

#include "vimdeploy/vimdeploy.h"

namespace vimdeploy {

[[noreturn]] inline void RefuseInput(const std::string& what, const std::string& hint) {
  throw Error(Error::Kind::kInput, what, hint);
}

[[noreturn]] inline void RefuseMissing(const std::string& what, const std::string& hint) {
  throw Error(Error::Kind::kMissing, what, hint);
}

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_REFUSE_H_
