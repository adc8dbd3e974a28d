#include "library.h"

#include <dlfcn.h>

#include <cstdlib>

#include "metadata.h"
#include "refuse.h"

namespace vimdeploy {

void* Library::Symbol(const char* symbol) const { return dlsym(handle, symbol); }

Library LoadLibrary(const LibrarySearch& search) {
  const int flags = RTLD_NOW | (search.global ? RTLD_GLOBAL : RTLD_LOCAL);
  std::string named = search.path;
  std::string who = "was named";
  const char* const variable = search.variable != nullptr ? std::getenv(search.variable) : nullptr;
  if (named.empty() && variable != nullptr && *variable != '\0') {
    named = variable;
    who = std::string(search.variable) + " names";
  }
  if (!named.empty()) {
    if (void* const handle = dlopen(named.c_str(), flags)) return {handle, named};
    RefuseMissing(search.what + " cannot be loaded from " + named + ", which " + who + ": " + dlerror(),
                  search.names.empty() ? search.hint : "name the file of the library, or none");
  }
  std::string reasons;
  for (const std::string& name : search.names) {
    if (void* const handle = dlopen(name.c_str(), flags)) return {handle, name};
    reasons += std::string(reasons.empty() ? "" : "; ") + dlerror();
  }
  RefuseMissing(search.what + " is not on this host (" + reasons + ")", search.hint);
}

std::string OwnFolder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&OwnFolder), &info) == 0 || info.dli_fname == nullptr) return "";
  return FolderOf(info.dli_fname);
}

}  // namespace vimdeploy
