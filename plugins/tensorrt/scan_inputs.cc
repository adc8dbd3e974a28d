#include "scan_inputs.h"

#include <cstring>
#include <initializer_list>

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

const char* TypeName(DataType type) {
  switch (static_cast<int32_t>(type)) {  // by number: the enumeration grows from release to release
    case 0:
      return "float32";
    case 1:
      return "float16";
    case 2:
      return "int8";
    case 3:
      return "int32";
    case 7:
      return "bfloat16";
    default:
      return "a type other than float32, float16, bfloat16";
  }
}

// kBF16 is 7 since TensorRT 9; the 8.5 headers have no name for it.
bool IoType(DataType type, int32_t* io) {
  switch (static_cast<int32_t>(type)) {
    case 0:
      *io = VIM_F32;
      return true;
    case 1:
      *io = VIM_F16;
      return true;
    case 7:
      *io = VIM_BF16;
      return true;
    default:
      return false;
  }
}

std::string ShapeText(const Dims& dims) {
  std::string text = "(";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + ")";
}

bool CheckShape(const char* name, const Dims& dims, std::initializer_list<int64_t> wanted, std::string* error) {
  bool same = dims.nbDims == static_cast<int32_t>(wanted.size());
  int32_t i = 0;
  std::string text = "(";
  for (const int64_t want : wanted) {
    if (same && want >= 0 && dims.d[i] >= 0 && dims.d[i] != want) same = false;
    text += (i ? ", " : "") + (want >= 0 ? std::to_string(want) : std::string("any"));
    ++i;
  }
  if (!same) *error = std::string(name) + " is of shape " + ShapeText(dims) + "; it must be " + text + ")";
  return same;
}

bool CheckType(const char* name, DataType type, DataType wanted, std::string* error) {
  if (type == wanted) return true;
  *error = std::string(name) + " is " + TypeName(type) + "; it must be " + TypeName(wanted);
  return false;
}

}  // namespace

bool ReadFields(const nvinfer1::PluginFieldCollection* fields, Attributes* attributes, std::string* error) {
  if (fields == nullptr) return true;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    const std::string name = field.name == nullptr ? "" : field.name;
    if (name == "plugin_namespace" || name == "plugin_version") continue;
    int32_t* const into = name == "delta_softplus" ? &attributes->delta_softplus
                          : name == "reverse"      ? &attributes->reverse
                                                   : nullptr;
    if (into == nullptr) {
      *error = "there is no attribute '" + name + "'; there are delta_softplus and reverse";
      return false;
    }
    if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
      *error = "attribute " + name + " must be one 32-bit integer";
      return false;
    }
    std::memcpy(into, field.data, sizeof(*into));
    if (*into != 0 && *into != 1) {
      *error = "attribute " + name + " is " + std::to_string(*into) + "; it must be 0 or 1";
      return false;
    }
  }
  return true;
}

bool FindOptionalInputs(const Dims* dims, int32_t count, Positions* positions, std::string* error) {
  *positions = {};
  if (count < 5 || count > kMaxInputs) {
    *error = std::to_string(count) + " inputs; there must be u, delta, A, B, C and at most D, z, delta_bias";
    return false;
  }
  if (count == kMaxInputs) {
    *positions = {5, 6, 7};
    return true;
  }
  for (int32_t i = 5; i < count; ++i) {
    if (dims[i].nbDims == 3 && positions->z < 0) {
      positions->z = i;
    } else if (dims[i].nbDims == 1 && positions->z < 0 && positions->D < 0) {
      positions->D = i;
    } else if (dims[i].nbDims == 1 && positions->delta_bias < 0) {
      positions->delta_bias = i;
    } else {
      *error = "input " + std::to_string(i) + " is of shape " + ShapeText(dims[i]) +
               "; after C come D (channels), z (batch, length, channels), delta_bias (channels), in this order";
      return false;
    }
  }
  if (count == 6 && positions->D == 5) {
    // Taken for the wrong one of the two, it would give wrong numbers without a word.
    *error = "one vector follows C, which may be D or delta_bias; give both, zeros for the one that is absent";
    return false;
  }
  return true;
}

bool Describe(const Attributes& attributes, const Dims* dims, const DataType* types, int32_t count,
              vim_selective_scan_desc* desc, Positions* positions, std::string* error) {
  if (!FindOptionalInputs(dims, count, positions, error)) return false;
  *desc = {};
  if (!IoType(types[kU], &desc->io)) {
    *error = std::string("u is ") + TypeName(types[kU]) + "; it must be float32, float16 or bfloat16";
    return false;
  }
  if (!CheckShape("u", dims[kU], {-1, -1, -1}, error)) return false;
  if (!CheckShape("A", dims[kA], {dims[kU].d[2], -1}, error)) return false;
  const int64_t batch = dims[kU].d[0], length = dims[kU].d[1], channels = dims[kU].d[2], states = dims[kA].d[1];
  if (!CheckShape("B", dims[kB], {batch, length, -1, states}, error)) return false;
  const int64_t groups = dims[kB].d[2];

  const struct {
    const char* name;
    int32_t at;
    std::initializer_list<int64_t> shape;
    bool float32;
  } checks[] = {
      {"delta", kDelta, {batch, length, channels}, false},
      {"A", kA, {channels, states}, true},
      {"B", kB, {batch, length, groups, states}, false},
      {"C", kC, {batch, length, groups, states}, false},
      {"D", positions->D, {channels}, true},
      {"z", positions->z, {batch, length, channels}, false},
      {"delta_bias", positions->delta_bias, {channels}, true},
  };
  for (const auto& check : checks) {
    if (check.at < 0) continue;
    if (!CheckShape(check.name, dims[check.at], check.shape, error)) return false;
    if (!CheckType(check.name, types[check.at], check.float32 ? DataType::kFLOAT : types[kU], error)) return false;
  }

  desc->batch = batch < 0 ? 0 : batch;
  desc->length = length < 0 ? 0 : length;
  desc->channels = channels < 0 ? 1 : channels;
  desc->states = states < 0 ? 1 : states;
  desc->groups = groups < 0 ? 1 : groups;
  desc->delta_softplus = attributes.delta_softplus;
  desc->reverse = attributes.reverse;
  desc->has_D = positions->D >= 0;
  desc->has_z = positions->z >= 0;
  desc->has_delta_bias = positions->delta_bias >= 0;
  vim_selective_scan_contiguous(desc);
  char reason[256];
  if (!vim_selective_scan_supports(desc, reason, sizeof(reason))) {
    *error = reason;
    return false;
  }
  return true;
}

bool SupportsFormat(const nvinfer1::PluginTensorDesc* tensors, int32_t position, int32_t input_count) {
  const nvinfer1::PluginTensorDesc& tensor = tensors[position];
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  int32_t io;
  if (position == kU) return IoType(tensor.type, &io);
  const bool output = position == input_count;
  // A, D and delta_bias; the last two are the vectors among the optional inputs.
  const bool float32 = !output && (position == kA || (position > kC && tensor.dims.nbDims == 1));
  return tensor.type == (float32 ? DataType::kFLOAT : tensors[kU].type);
}

bool Enqueue(const Attributes& attributes, const nvinfer1::PluginTensorDesc* input_desc, int32_t input_count,
             const void* const* inputs, void* const* outputs, void* workspace, void* stream, std::string* error) {
  if (input_count < 0 || input_count > kMaxInputs) {
    *error = std::to_string(input_count) + " inputs";
    return false;
  }
  Dims dims[kMaxInputs];
  DataType types[kMaxInputs];
  for (int32_t i = 0; i < input_count; ++i) {
    dims[i] = input_desc[i].dims;
    types[i] = input_desc[i].type;
  }
  vim_selective_scan_desc desc;
  Positions positions;
  if (!Describe(attributes, dims, types, input_count, &desc, &positions, error)) return false;

  auto at = [&](int32_t position) { return position < 0 ? nullptr : inputs[position]; };
  vim_selective_scan_args args = {};
  args.u = inputs[kU];
  args.delta = inputs[kDelta];
  args.A = static_cast<const float*>(inputs[kA]);
  args.B = inputs[kB];
  args.C = inputs[kC];
  args.D = static_cast<const float*>(at(positions.D));
  args.z = at(positions.z);
  args.delta_bias = static_cast<const float*>(at(positions.delta_bias));
  args.y = outputs[0];
  switch (vim_selective_scan_cuda(&desc, &args, workspace, stream)) {
    case VIM_OK:
      return true;
    case VIM_UNSUPPORTED:
      *error = "no kernel runs these sizes on this device";
      return false;
    default:
      *error = std::string("CUDA: ") + vim_cuda_last_error();
      return false;
  }
}

}  // namespace vim::trt
