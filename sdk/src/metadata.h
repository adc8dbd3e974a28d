// From the text that `vimdeploy export` put into a model file to ModelInfo.
#ifndef VIMDEPLOY_SDK_METADATA_H_
#define VIMDEPLOY_SDK_METADATA_H_

#include <map>
#include <string>

#include "json.h"
#include "vimdeploy/vimdeploy.h"

namespace vimdeploy {

// `props`: ONNX metadata. Throws kInput, naming `source`, for what vimdeploy did not write or did not write so.
ModelInfo InfoFromProps(std::map<std::string, std::string> props, const std::string& source);

// A JSON file whose text is an object. Throws kInput with `hint`.
Json ReadJsonFile(const std::string& path, const std::string& hint);

bool IsFile(const std::string& path);
bool IsFolder(const std::string& path);
std::string FolderOf(const std::string& path);  // "." for a bare name
std::string NameOf(const std::string& path);

// Throws kInput when the manifest beside `model` gives another SHA-256 for it. No manifest, or no word of it, passes.
void CheckManifest(const std::string& model);

// In hex. Throws kInput when the file cannot be read.
std::string Sha256Of(const std::string& path);

// Throws kInput when the file's SHA-256 is not `wanted`; `who` says so.
void CheckSha256(const std::string& path, const std::string& wanted, const std::string& who, const std::string& hint);

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_METADATA_H_
