// An op of the vim domain as ONNX Runtime sees one: what its tensors and attributes must be, and the kernel behind it.
// The table in ops.cc has a row for each; op.cc makes a custom op of any row, for one backend and one io type. No
// arithmetic.
#ifndef VIM_ONNXRUNTIME_OP_H_
#define VIM_ONNXRUNTIME_OP_H_

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "vim/add_rms_norm.h"
#include "vim/bi_causal_conv1d.h"
#include "vim/bi_selective_scan.h"
#include "vim/selective_scan.h"

namespace vim::ort {

// The interface asked of the runtime, whatever the headers offer: a library built with newer ones loads in 1.21 too.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime 1.21 or newer are needed");

constexpr int kMaxInputs = 14;
constexpr int kMaxOutputs = 2;
constexpr int kMaxAttributes = 2;
constexpr int kMaxRank = 8;

// Refusals, as exceptions within this library; op.cc turns them into a status at its boundary.
struct Refusal {
  std::string text;
};

template <typename... Parts>
[[noreturn]] void Refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refusal{text.str()};
}

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
  const char* name = nullptr;
  enum Type : uint8_t { kIo, kFloat32 } type = kIo;  // kIo: that of the op's first input: fp32, fp16 or bf16
  Size shape[5] = {};
  bool optional = false;
};

struct AttributeRule {
  const char* name = nullptr;
  enum Kind : uint8_t { kFlag, kNumber } kind = kFlag;  // 0 or 1; fp32
  float absent = 0.0f;                                  // its value where the node has none
};

// Inputs that passed an op's rules, and where its outputs go.
struct Call {
  int64_t sizes[kSizeCount];
  vim_dtype io;
  const float* attributes;
  const void* inputs[kMaxInputs];  // null for those left out
  void* outputs[kMaxOutputs];

  const float* Float32(int input) const { return static_cast<const float*>(inputs[input]); }
  // From `offset` elements of the io type on.
  const void* Io(int input, int64_t offset = 0) const {
    return static_cast<const char*>(inputs[input]) + offset * (io == VIM_F32 ? 4 : 2);
  }
};

// Where kernels run: an execution provider and its kernels, which find threads or a stream in the context.
struct Backend {
  const char* provider;    // null: the CPU's
  void (*check)();         // refuses where no kernel can run at all; may be null
  const char* (*error)();  // why the calling thread's last kernel could not be launched; may be null
  vim_status (*selective_scan)(const vim_selective_scan_desc&, const vim_selective_scan_args&,
                               const Ort::KernelContext&);
  vim_status (*bi_selective_scan)(const vim_bi_selective_scan_desc&, const vim_bi_selective_scan_args&,
                                  const Ort::KernelContext&);
  vim_status (*bi_causal_conv1d)(const vim_bi_causal_conv1d_desc&, const vim_bi_causal_conv1d_args&,
                                 const Ort::KernelContext&);
  vim_status (*add_rms_norm)(const vim_add_rms_norm_desc&, const vim_add_rms_norm_args&, const Ort::KernelContext&);
};

extern const Backend kCpu;
extern const Backend kCuda;  // in libvimdeploy_ort_cuda.so

struct Op {
  const char* name;
  TensorRule inputs[kMaxInputs];
  TensorRule outputs[kMaxOutputs];  // made of sizes of inputs that are not optional
  AttributeRule attributes[kMaxAttributes];
  // The output that may take the place of an input, which ONNX Runtime asks without saying of which op; may be null.
  size_t (*in_place)(int** input, int** output);

  void (*check)(const Call& call);  // refuses sizes that no kernel takes; `call` has no outputs yet
  vim_status (*run)(const Call& call, const Backend& backend, const Ort::KernelContext& context);

  int input_count() const { return Count(inputs); }
  int output_count() const { return Count(outputs); }
  int attribute_count() const { return Count(attributes); }

 private:
  template <typename Rule, int kMost>
  static int Count(const Rule (&rules)[kMost]) {
    int count = 0;
    while (count < kMost && rules[count].name != nullptr) ++count;
    return count;
  }
};

constexpr int kOpCount = 4;
extern const Op kOps[kOpCount];

// One object for each type of the first input. The other inputs take any type, so that a wrong one is refused by us,
// with a sentence, and not by ORT's "no kernel def matches node inputs".
struct CustomOp : OrtCustomOp {
  // Before 1.24, ORT dereferences null when an op that infers shapes has an optional input left out (fixed by its pull
  // request 26199): there the op must not offer to.
  CustomOp(const Op& op, const Backend& backend, ONNXTensorElementDataType io, bool infer_shapes);

  const Op& op;
  const Backend& backend;
  ONNXTensorElementDataType io;
};

}  // namespace vim::ort

#endif  // VIM_ONNXRUNTIME_OP_H_
