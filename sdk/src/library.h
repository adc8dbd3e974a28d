// Shared libraries that are loaded when they are first needed, and stay.
#ifndef VIMDEPLOY_SDK_LIBRARY_H_
#define VIMDEPLOY_SDK_LIBRARY_H_

#include <string>
#include <vector>

namespace vimdeploy {

struct Library {
  void* handle = nullptr;
  std::string name;  // as it was asked for

  // Null when the library has no such symbol.
  void* Symbol(const char* symbol) const;
};

struct LibrarySearch {
  std::string what;                // for messages: "ONNX Runtime"
  std::string path;                // named by the program; "" if it named none
  const char* variable;            // of the environment, asked next; null: none
  std::vector<std::string> names;  // asked of the dynamic loader last
  std::string hint;                // what to do when none is there
  bool global = false;             // whether libraries loaded later see its symbols
};

// Throws kMissing with the loader's words. A library that was named must load: the search ends there.
Library LoadLibrary(const LibrarySearch& search);

// The folder of the library, or program, that this code is linked into; "" when the system does not tell.
std::string OwnFolder();

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_LIBRARY_H_
