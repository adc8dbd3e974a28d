// An op of the vim domain as TensorRT sees one: what its tensors and attributes must be, and the kernel behind it. The
// table in ops.cc has a row for each; op.cc holds any row against what TensorRT hands over; the adapters
// (plugin_v3.h, plugin_v2.cc) know no op in particular. Compiled against the headers of each TensorRT. No arithmetic.
#ifndef VIMDEPLOY_PLUGINS_TENSORRT_OP_H_
#define VIMDEPLOY_PLUGINS_TENSORRT_OP_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "vim/selective_scan.h"

namespace vim::trt {

constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "vim";
constexpr int32_t kMaxInputs = 14;
constexpr int32_t kMaxOutputs = 2;
constexpr int32_t kMaxAttributes = 2;

// The sizes that shapes are made of. One that occurs twice in an op's shapes is the same twice.
enum Size : uint8_t {
  kEnd,      // of a shape
  kLeading,  // any number of dimensions; their product
  kBatch,
  kLength,
  kChannels,
  kStates,
  kGroups,
  kRow,    // of x_proj's output: dt, then B, then C
  kWidth,  // of in_proj's output: x, then the gate
  kTaps,
  kSizeCount
};

struct TensorRule {
  const char* name;
  enum Type : uint8_t { kIo, kFloat32 } type;  // kIo: that of the op's first input: fp32, fp16 or bf16
  Size shape[5];
  bool optional = false;  // such inputs come last
};

union Attribute {
  int32_t flag;
  float number;
};

struct AttributeRule {
  const char* name;
  enum Kind : uint8_t { kFlag, kNumber } kind;  // 0 or 1; fp32
  Attribute absent;                             // its value where the node has none
};

// Inputs that passed an op's rules.
struct Call {
  const Attribute* attributes;
  int64_t sizes[kSizeCount];  // -1 where TensorRT does not know yet, and where the op has no such size
  int32_t io;                 // vim_dtype
  int32_t at[kMaxInputs];     // of each rule's tensor among the inputs, -1 where it is absent
};

struct Op {
  const char* name;
  int32_t input_count;
  TensorRule inputs[kMaxInputs];
  int32_t output_count;
  TensorRule outputs[kMaxOutputs];  // made of sizes of inputs that are not optional
  int32_t attribute_count;
  AttributeRule attributes[kMaxAttributes];

  // Whether a kernel takes these sizes, all of which are known; if not, why.
  bool (*supports)(const Call& call, std::string* error);
  size_t (*workspace)(const Call& call);
  // Enqueues. `inputs` as TensorRT numbers them.
  vim_status (*run)(const Call& call, const void* const* inputs, void* const* outputs, void* workspace, void* stream);

  int32_t required_inputs() const;
};

constexpr int32_t kOpCount = 4;
extern const Op kOps[kOpCount];

struct Tensor {
  nvinfer1::Dims dims;
  nvinfer1::DataType type;
};

// Reads the attributes of a node. False, and why in `error`, when one is unknown, or of a wrong type or value. Fields
// that the parser keeps for itself (plugin_namespace, plugin_version) are skipped.
bool ReadFields(const Op& op, const nvinfer1::PluginFieldCollection* fields, Attribute* attributes, std::string* error);

// An attribute as a plugin field; `value` may be null.
nvinfer1::PluginField FieldOf(const AttributeRule& rule, const Attribute* value);

// "name=value,..." of all attributes.
std::string AttributesText(const Op& op, const Attribute* attributes);

// Holds `count` inputs against the op's rules and asks its kernel. False, and why, when they do not pass. A dimension
// of -1 passes.
bool Bind(const Op& op, const Attribute* attributes, const Tensor* inputs, int32_t count, Call* call,
          std::string* error);

// Whether these are as many inputs and outputs as the op takes; if not, why.
bool CountsPass(const Op& op, int32_t input_count, int32_t output_count, std::string* error);

// Whether the tensor at `position` (inputs, then outputs) may have this type and format, given those before it.
bool SupportsFormat(const Op& op, const nvinfer1::PluginTensorDesc* tensors, int32_t position, int32_t input_count);

nvinfer1::DataType OutputType(const Op& op, int32_t output, nvinfer1::DataType io);

// The shape of an output from those of the inputs. False, and why, when an input it depends on is of another rank.
bool OutputShape(const Op& op, int32_t output, const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* shape,
                 std::string* error);

// Binds and enqueues. False, and why, when the inputs do not pass or the kernel refuses.
bool Enqueue(const Op& op, const Attribute* attributes, const nvinfer1::PluginTensorDesc* descs, int32_t count,
             const void* const* inputs, void* const* outputs, void* workspace, void* stream, std::string* error);

}  // namespace vim::trt

#endif  // VIMDEPLOY_PLUGINS_TENSORRT_OP_H_
