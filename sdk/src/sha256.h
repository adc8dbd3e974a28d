// SHA-256 (FIPS 180-4), to compare files with what manifests say of them.
#ifndef VIMDEPLOY_SDK_SHA256_H_
#define VIMDEPLOY_SDK_SHA256_H_

#include <string>

namespace vimdeploy {

// The digest of a file's content in hex. Throws std::runtime_error when the file cannot be read.
std::string Sha256OfFile(const std::string& path);

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_SHA256_H_
