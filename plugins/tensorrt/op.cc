#include "op.h"

#include <cstdio>
#include <cstring>

#include "vim/selective_scan_cuda.h"

namespace vim::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kSizeNames[kSizeCount] = {"",       "...",    "batch", "length", "channels",
                                                "states", "groups", "row",   "width",  "taps"};

// DataType::kBF16, which the 8.5 headers have no name for.
constexpr int32_t kBf16 = 7;

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
    case kBf16:
      return "bfloat16";
    default:
      return "a type other than float32, float16, bfloat16";
  }
}

bool IoType(DataType type, int32_t* io) {
  switch (static_cast<int32_t>(type)) {
    case 0:
      *io = VIM_F32;
      return true;
    case 1:
      *io = VIM_F16;
      return true;
    case kBf16:
      *io = VIM_BF16;
      return true;
    default:
      return false;
  }
}

bool AnyRank(const TensorRule& rule) { return rule.shape[0] == kLeading; }

int32_t Rank(const TensorRule& rule) {
  int32_t rank = 0;
  while (rule.shape[rank] != kEnd) ++rank;
  return rank;
}

bool RankPasses(const TensorRule& rule, int32_t rank) {
  return AnyRank(rule) ? rank >= Rank(rule) - 1 : rank == Rank(rule);
}

std::string Comma(const std::string& text) { return text.empty() ? "" : ", "; }

std::string ShapeText(const Dims& dims) {
  std::string text;
  for (int32_t i = 0; i < dims.nbDims; ++i) text += Comma(text) + std::to_string(dims.d[i]);
  return "(" + text + ")";
}

// What the rule asks for, with the sizes that earlier inputs have settled; `leading` are theirs.
std::string WantedText(const TensorRule& rule, const int64_t* sizes, const Dims& leading, int32_t leading_count) {
  std::string text;
  for (const Size* size = rule.shape; *size != kEnd; ++size) {
    if (*size == kLeading && sizes[kLeading] >= 0) {
      for (int32_t i = 0; i < leading_count; ++i) text += Comma(text) + std::to_string(leading.d[i]);
    } else {
      text += Comma(text) + (sizes[*size] >= 0 ? std::to_string(sizes[*size]) : kSizeNames[*size]);
    }
  }
  return "(" + text + ")";
}

// Settles the sizes of a shape, or holds it against those settled before.
bool BindShape(const TensorRule& rule, const Dims& dims, const Dims& first, int64_t* sizes) {
  if (!RankPasses(rule, dims.nbDims)) return false;
  int32_t d = 0;
  for (const Size* size = rule.shape; *size != kEnd; ++size) {
    if (*size == kLeading) {
      const int32_t count = dims.nbDims - (Rank(rule) - 1);
      int64_t product = 1;
      bool known = true, same = dims.nbDims == first.nbDims;
      for (; d < count; ++d) {
        known = known && dims.d[d] >= 0;
        product *= dims.d[d];
        same = same && (dims.d[d] < 0 || first.d[d] < 0 || dims.d[d] == first.d[d]);
      }
      if (!same) return false;
      if (known) sizes[kLeading] = product;
    } else {
      const int64_t value = dims.d[d++];
      if (value < 0) continue;
      if (sizes[*size] >= 0 && sizes[*size] != value) return false;
      sizes[*size] = value;
    }
  }
  return true;
}

// Gives every input its rule. Parsers do not pass on optional inputs that are absent, so the ranks of those that are
// there must tell which they are.
bool FindInputs(const Op& op, const Tensor* inputs, int32_t count, int32_t* at, std::string* error) {
  const int32_t required = op.required_inputs(), given = count - required;
  const int32_t optional = op.input_count - required;
  int32_t fits = 0;
  uint32_t found = 0, all_fits = 0;
  for (uint32_t chosen = 0; chosen < 1u << optional; ++chosen) {
    int32_t next = required;
    bool passes = true;
    for (int32_t i = 0; i < optional; ++i) {
      if (!(chosen & 1u << i)) continue;
      passes = passes && next < count && RankPasses(op.inputs[required + i], inputs[next].dims.nbDims);
      ++next;
    }
    if (!passes || next != count) continue;
    ++fits;
    found = chosen;
    all_fits |= chosen;
  }
  std::string names;
  for (int32_t i = 0; i < optional; ++i)
    if (fits == 0 || all_fits & 1u << i)
      names += (names.empty() ? "" : fits == 0 ? ", " : " or ") + std::string(op.inputs[required + i].name);
  if (fits == 0) {
    std::string shapes;
    for (int32_t i = required; i < count; ++i) shapes += Comma(shapes) + ShapeText(inputs[i].dims);
    *error = "after " + std::string(op.inputs[required - 1].name) + " come inputs of shape " + shapes +
             "; there may be " + names + ", in this order";
    return false;
  }
  if (fits > 1) {
    // Taken for the wrong one, it would give wrong numbers without a word.
    *error = "the shapes do not tell whether " + std::to_string(given) + " of the optional inputs is " + names +
             "; give them all, zeros for what is absent";
    return false;
  }
  int32_t next = required;
  for (int32_t i = 0; i < op.input_count; ++i) at[i] = i < required ? i : found & 1u << (i - required) ? next++ : -1;
  return true;
}

}  // namespace

int32_t Op::required_inputs() const {
  int32_t required = 0;
  while (required < input_count && !inputs[required].optional) ++required;
  return required;
}

bool ReadFields(const Op& op, const nvinfer1::PluginFieldCollection* fields, Attribute* attributes,
                std::string* error) {
  for (int32_t i = 0; i < op.attribute_count; ++i) attributes[i] = op.attributes[i].absent;
  const int32_t count = fields == nullptr ? 0 : fields->nbFields;
  for (int32_t f = 0; f < count; ++f) {
    const PluginField& field = fields->fields[f];
    const std::string name = field.name == nullptr ? "" : field.name;
    if (name == "plugin_namespace" || name == "plugin_version") continue;
    int32_t i = 0;
    while (i < op.attribute_count && name != op.attributes[i].name) ++i;
    if (i == op.attribute_count) {
      std::string known;
      for (int32_t k = 0; k < op.attribute_count; ++k)
        known += (k ? " and " : "; there are ") + std::string(op.attributes[k].name);
      *error = "there is no attribute '" + name + "'" + (known.empty() ? "; this op has none" : known);
      return false;
    }
    const bool flag = op.attributes[i].kind == AttributeRule::kFlag;
    if (field.type != (flag ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32) || field.length != 1 ||
        field.data == nullptr) {
      *error = "attribute " + name + " must be one 32-bit " + (flag ? "integer" : "float");
      return false;
    }
    std::memcpy(&attributes[i], field.data, sizeof(Attribute));
    if (flag && attributes[i].flag != 0 && attributes[i].flag != 1) {
      *error = "attribute " + name + " is " + std::to_string(attributes[i].flag) + "; it must be 0 or 1";
      return false;
    }
  }
  return true;
}

PluginField FieldOf(const AttributeRule& rule, const Attribute* value) {
  if (rule.kind == AttributeRule::kFlag)
    return PluginField(rule.name, value == nullptr ? nullptr : &value->flag, PluginFieldType::kINT32, 1);
  return PluginField(rule.name, value == nullptr ? nullptr : &value->number, PluginFieldType::kFLOAT32, 1);
}

std::string AttributesText(const Op& op, const Attribute* attributes) {
  std::string text;
  for (int32_t i = 0; i < op.attribute_count; ++i) {
    char value[32];
    if (op.attributes[i].kind == AttributeRule::kFlag)
      std::snprintf(value, sizeof value, "%d", attributes[i].flag);
    else
      std::snprintf(value, sizeof value, "%.9g", static_cast<double>(attributes[i].number));
    text += (i ? "," : "") + std::string(op.attributes[i].name) + "=" + value;
  }
  return text;
}

bool CountsPass(const Op& op, int32_t input_count, int32_t output_count, std::string* error) {
  const int32_t least = op.required_inputs();
  if (input_count >= least && input_count <= op.input_count && output_count == op.output_count) return true;
  std::string names;
  for (int32_t i = 0; i < op.input_count; ++i)
    names += (i == 0 ? "" : i == least ? " and at most " : ", ") + std::string(op.inputs[i].name);
  *error = std::to_string(input_count) + " inputs and " + std::to_string(output_count) + " outputs; there must be " +
           names + ", and " + std::to_string(op.output_count) + (op.output_count == 1 ? " output" : " outputs");
  return false;
}

bool Bind(const Op& op, const Attribute* attributes, const Tensor* inputs, int32_t count, Call* call,
          std::string* error) {
  if (!CountsPass(op, count, op.output_count, error)) return false;
  *call = {};
  call->attributes = attributes;
  for (int64_t& size : call->sizes) size = -1;
  if (!FindInputs(op, inputs, count, call->at, error)) return false;

  if (!IoType(inputs[0].type, &call->io)) {
    *error = std::string(op.inputs[0].name) + " is " + TypeName(inputs[0].type) +
             "; it must be float32, float16 or bfloat16";
    return false;
  }
  bool known = true;
  for (int32_t i = 0; i < op.input_count; ++i) {
    if (call->at[i] < 0) continue;
    const TensorRule& rule = op.inputs[i];
    const Tensor& tensor = inputs[call->at[i]];
    for (int32_t d = 0; d < tensor.dims.nbDims; ++d) known = known && tensor.dims.d[d] >= 0;
    if (!BindShape(rule, tensor.dims, inputs[0].dims, call->sizes)) {
      const int32_t leading = inputs[0].dims.nbDims - (Rank(op.inputs[0]) - 1);
      *error = std::string(rule.name) + " is of shape " + ShapeText(tensor.dims) + "; it must be " +
               WantedText(rule, call->sizes, inputs[0].dims, leading);
      return false;
    }
    const DataType wanted = rule.type == TensorRule::kFloat32 ? DataType::kFLOAT : inputs[0].type;
    if (tensor.type != wanted) {
      *error = std::string(rule.name) + " is " + TypeName(tensor.type) + "; it must be " + TypeName(wanted) +
               (rule.type == TensorRule::kFloat32 ? ", whatever the type of " : ", as is ") + op.inputs[0].name;
      return false;
    }
  }
  return !known || op.supports(*call, error);
}

bool SupportsFormat(const Op& op, const nvinfer1::PluginTensorDesc* tensors, int32_t position, int32_t input_count) {
  const nvinfer1::PluginTensorDesc& tensor = tensors[position];
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  int32_t io;
  if (position == 0) return IoType(tensor.type, &io);
  if (position >= input_count) return tensor.type == OutputType(op, position - input_count, tensors[0].type);
  // Of the rules that an input here may belong to, those of its rank agree on the type.
  int32_t i = position;
  while (i < op.input_count && op.inputs[i].optional && !RankPasses(op.inputs[i], tensor.dims.nbDims)) ++i;
  if (i == op.input_count) return false;
  return tensor.type == (op.inputs[i].type == TensorRule::kFloat32 ? DataType::kFLOAT : tensors[0].type);
}

DataType OutputType(const Op& op, int32_t output, DataType io) {
  return op.outputs[output].type == TensorRule::kFloat32 ? DataType::kFLOAT : io;
}

bool OutputShape(const Op& op, int32_t output, const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* shape,
                 std::string* error) {
  for (int32_t i = 0; i < op.required_inputs(); ++i) {
    if (RankPasses(op.inputs[i], inputs[i].nbDims)) continue;
    int64_t sizes[kSizeCount];
    for (int64_t& size : sizes) size = -1;
    *error = std::string(op.inputs[i].name) + " has " + std::to_string(inputs[i].nbDims) + " dimensions; it must be " +
             WantedText(op.inputs[i], sizes, {}, 0);
    return false;
  }
  if (AnyRank(op.outputs[output])) {  // as the first input
    *shape = inputs[0];
    return true;
  }
  shape->nbDims = 0;
  for (const Size* size = op.outputs[output].shape; *size != kEnd; ++size) {
    const nvinfer1::IDimensionExpr* found = nullptr;
    for (int32_t i = 0; i < op.required_inputs() && found == nullptr; ++i)
      for (int32_t d = 0; d < Rank(op.inputs[i]) && found == nullptr; ++d)
        if (op.inputs[i].shape[d] == *size) found = inputs[i].d[d];
    shape->d[shape->nbDims++] = found;
  }
  return true;
}

bool Enqueue(const Op& op, const Attribute* attributes, const nvinfer1::PluginTensorDesc* descs, int32_t count,
             const void* const* inputs, void* const* outputs, void* workspace, void* stream, std::string* error) {
  Tensor tensors[kMaxInputs] = {};
  for (int32_t i = 0; i < count && i < kMaxInputs; ++i) tensors[i] = {descs[i].dims, descs[i].type};
  Call call;
  if (!Bind(op, attributes, tensors, count, &call, error)) return false;
  switch (op.run(call, inputs, outputs, workspace, stream)) {
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
