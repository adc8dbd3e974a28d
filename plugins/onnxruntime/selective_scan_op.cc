#include "selective_scan_op.h"

#include <array>
#include <exception>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "vim/selective_scan.h"

namespace vim::ort {
namespace {

enum Input : size_t { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kInputCount };

struct InputTraits {
  const char* name;
  bool optional;
  bool float32;  // fp32 whatever the type of u
};

constexpr std::array<InputTraits, kInputCount> kInputs = {{
    {"u", false, false},
    {"delta", false, false},
    {"A", false, true},
    {"B", false, false},
    {"C", false, false},
    {"D", true, true},
    {"z", true, false},
    {"delta_bias", true, true},
}};

// Refusals, as exceptions within this file; Guard turns them into a status at the boundary.
struct Refusal {
  std::string text;
};

template <typename... Parts>
[[noreturn]] void Refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refusal{text.str()};
}

// Runs `body`; no exception leaves.
template <typename Body>
OrtStatus* Guard(const std::string& node, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Refusal& refusal) {
      return Ort::Status(("vim::SelectiveScan '" + node + "': " + refusal.text).c_str(), ORT_INVALID_ARGUMENT)
          .release();
    } catch (const Ort::Exception& error) {
      return Ort::Status(error).release();
    } catch (const std::exception& error) {
      return Ort::Status(error).release();
    }
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION,
                                      "vim::SelectiveScan: out of memory while reporting an error");
  }
}

std::string TypeName(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return "float64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return "int64";
    default:
      return "ONNX element type " + std::to_string(static_cast<int>(type));
  }
}

vim_dtype ToVimType(ONNXTensorElementDataType io) {
  switch (io) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return VIM_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return VIM_F16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return VIM_BF16;
    default:
      Refuse("u is ", TypeName(io), "; it must be float32, float16 or bfloat16");
  }
}

void CheckType(Input input, ONNXTensorElementDataType type, ONNXTensorElementDataType io) {
  const bool float32 = kInputs[input].float32;
  const ONNXTensorElementDataType wanted = float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : io;
  if (type != wanted)
    Refuse(kInputs[input].name, " is ", TypeName(type), "; it must be ", TypeName(wanted),
           float32 ? ", whatever the type of u" : ", as u is");
}

using Shape = std::vector<int64_t>;

struct Dim {
  const char* name;
  int64_t value;  // kAny: not known yet, so anything
};
constexpr int64_t kAny = -1;

void CheckShape(Input input, const Shape& shape, std::initializer_list<Dim> wanted) {
  bool same = shape.size() == wanted.size();
  size_t i = 0;
  for (const Dim& dim : wanted) {
    if (!same) break;
    same = dim.value == kAny || shape[i] == dim.value;
    ++i;
  }
  if (same) return;

  std::ostringstream has, names, values;
  for (size_t j = 0; j < shape.size(); ++j) has << (j ? ", " : "") << shape[j];
  const char* comma = "";
  for (const Dim& dim : wanted) {
    names << comma << dim.name;
    if (dim.value == kAny)
      values << comma << dim.name;
    else
      values << comma << dim.value;
    comma = ", ";
  }
  Refuse(kInputs[input].name, " has shape (", has.str(), "); it must be (", names.str(), ")",
         names.str() == values.str() ? "" : " = (" + values.str() + ")");
}

bool Flag(const OrtKernelInfo* info, const char* name, bool absent) {
  const OrtApi& api = Ort::GetApi();
  int64_t value = 0;
  if (Ort::Status(api.KernelInfoGetAttribute_int64(info, name, &value)).IsOK()) {
    if (value != 0 && value != 1) Refuse("attribute ", name, " is ", value, "; it must be 0 or 1");
    return value != 0;
  }
  // ORT has one error for an attribute that is absent and for one of another type.
  float number = 0;
  size_t size = 0;
  if (Ort::Status(api.KernelInfoGetAttribute_float(info, name, &number)).IsOK() ||
      Ort::Status(api.KernelInfoGetAttribute_string(info, name, nullptr, &size)).IsOK())
    Refuse("attribute ", name, " is not an integer; it must be 0 or 1");
  return absent;
}

std::string NodeName(const OrtKernelInfo* info) {
  const OrtApi& api = Ort::GetApi();
  size_t size = 0;
  Ort::Status(api.KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  if (size == 0 || !Ort::Status(api.KernelInfo_GetNodeName(info, name.data(), &size)).IsOK()) return "";
  name.resize(size - 1);  // the size counts the terminator
  return name;
}

struct Pool {
  const Ort::KernelContext* context;
  std::exception_ptr error;
};

// The kernel is C and its tasks do not throw; what may is ORT's own check before the first of them.
void ParallelFor(void* pool_pointer, void (*body)(void* context, size_t index), size_t count, void* context) {
  Pool& pool = *static_cast<Pool*>(pool_pointer);
  try {
    pool.context->ParallelFor(body, count, 0, context);
  } catch (...) {
    pool.error = std::current_exception();
  }
}

class SelectiveScanKernel {
 public:
  SelectiveScanKernel(const OrtKernelInfo* info, ONNXTensorElementDataType io, std::string node)
      : node_(std::move(node)),
        io_(io),
        vim_type_(ToVimType(io)),
        delta_softplus_(Flag(info, "delta_softplus", true)),
        reverse_(Flag(info, "reverse", false)) {
    CheckTypes(info);
  }

  const std::string& node() const { return node_; }

  void Compute(OrtKernelContext* ort_context) const {
    const Ort::KernelContext context(ort_context);
    std::array<Ort::ConstValue, kInputCount> inputs;
    std::array<Shape, kInputCount> shapes;
    const size_t given = context.GetInputCount();
    for (size_t i = 0; i < kInputCount; ++i) {
      if (i < given) inputs[i] = context.GetInput(i);
      if (inputs[i] == nullptr) {
        if (!kInputs[i].optional) Refuse(kInputs[i].name, " is missing");
        continue;
      }
      const auto info = inputs[i].GetTensorTypeAndShapeInfo();
      CheckType(static_cast<Input>(i), info.GetElementType(), io_);
      shapes[i] = info.GetShape();
    }

    const auto desc = Describe(inputs, shapes);
    const Shape& shape = shapes[kU];
    auto output = context.GetOutput(0, shape.data(), shape.size());
    vim_selective_scan_args args = {};
    args.u = inputs[kU].GetTensorRawData();
    args.delta = inputs[kDelta].GetTensorRawData();
    args.A = inputs[kA].GetTensorData<float>();
    args.B = inputs[kB].GetTensorRawData();
    args.C = inputs[kC].GetTensorRawData();
    if (desc.has_D) args.D = inputs[kD].GetTensorData<float>();
    if (desc.has_z) args.z = inputs[kZ].GetTensorRawData();
    if (desc.has_delta_bias) args.delta_bias = inputs[kDeltaBias].GetTensorData<float>();
    args.y = output.GetTensorMutableRawData();

    Pool pool = {&context, nullptr};
    const vim_status status = vim_selective_scan_cpu(&desc, &args, ParallelFor, &pool);
    if (pool.error) std::rethrow_exception(pool.error);
    if (status != VIM_OK) Refuse("the kernel returned status ", static_cast<int>(status));
  }

 private:
  // At session creation, so that a wrong model is refused before it runs.
  void CheckTypes(const OrtKernelInfo* info) const {
    const OrtApi& api = Ort::GetApi();
    size_t given = 0;
    Ort::ThrowOnError(api.KernelInfo_GetInputCount(info, &given));
    for (size_t i = 0; i < kInputCount && i < given; ++i) {
      OrtTypeInfo* type_info = nullptr;
      // An input left out has no type, which ORT reports as an error.
      if (!Ort::Status(api.KernelInfo_GetInputTypeInfo(info, i, &type_info)).IsOK() || type_info == nullptr) continue;
      const Ort::TypeInfo owner(type_info);
      if (owner.GetONNXType() != ONNX_TYPE_TENSOR) Refuse(kInputs[i].name, " is not a tensor");
      CheckType(static_cast<Input>(i), owner.GetTensorTypeAndShapeInfo().GetElementType(), io_);
    }
  }

  vim_selective_scan_desc Describe(const std::array<Ort::ConstValue, kInputCount>& inputs,
                                   const std::array<Shape, kInputCount>& shapes) const {
    CheckShape(kU, shapes[kU], {{"batch", kAny}, {"length", kAny}, {"channels", kAny}});
    const Dim batch = {"batch", shapes[kU][0]}, length = {"length", shapes[kU][1]},
              channels = {"channels", shapes[kU][2]};
    CheckShape(kDelta, shapes[kDelta], {batch, length, channels});
    CheckShape(kA, shapes[kA], {channels, {"states", kAny}});
    const Dim states = {"states", shapes[kA][1]};
    CheckShape(kB, shapes[kB], {batch, length, {"groups", kAny}, states});
    const Dim groups = {"groups", shapes[kB][2]};
    CheckShape(kC, shapes[kC], {batch, length, groups, states});
    if (inputs[kD] != nullptr) CheckShape(kD, shapes[kD], {channels});
    if (inputs[kZ] != nullptr) CheckShape(kZ, shapes[kZ], {batch, length, channels});
    if (inputs[kDeltaBias] != nullptr) CheckShape(kDeltaBias, shapes[kDeltaBias], {channels});

    vim_selective_scan_desc desc = {};
    desc.batch = batch.value;
    desc.length = length.value;
    desc.channels = channels.value;
    desc.states = states.value;
    desc.groups = groups.value;
    desc.io = vim_type_;
    desc.delta_softplus = delta_softplus_;
    desc.reverse = reverse_;
    desc.has_D = inputs[kD] != nullptr;
    desc.has_z = inputs[kZ] != nullptr;
    desc.has_delta_bias = inputs[kDeltaBias] != nullptr;
    vim_selective_scan_contiguous(&desc);
    char reason[256];
    if (!vim_selective_scan_supports(&desc, reason, sizeof reason)) Refuse(reason);
    return desc;
  }

  std::string node_;
  ONNXTensorElementDataType io_;
  vim_dtype vim_type_;
  bool delta_softplus_;
  bool reverse_;
};

OrtStatus* MakeKernel(const OrtCustomOp* op, const OrtApi* /*api*/, const OrtKernelInfo* info, void** kernel) noexcept {
  std::string node;
  *kernel = nullptr;
  const OrtStatus* const no_name = Guard("", [&] { node = NodeName(info); });
  if (no_name != nullptr) return const_cast<OrtStatus*>(no_name);
  return Guard(node,
               [&] { *kernel = new SelectiveScanKernel(info, static_cast<const SelectiveScanOp*>(op)->io, node); });
}

// y is as u. ORT drops the status this returns, so there is no use in refusing here.
OrtStatus* InferShape(const OrtCustomOp* /*op*/, OrtShapeInferContext* context) noexcept {
  return Guard("", [&] {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* u = nullptr;  // the context's own
    Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, kU, &u));
    size_t rank = 0;
    Ort::ThrowOnError(api.GetDimensionsCount(u, &rank));
    if (rank != 3) return;  // a shape that is not known reads as that of a scalar
    std::array<int64_t, 3> dims = {};
    std::array<const char*, 3> symbols = {};
    Ort::ThrowOnError(api.GetDimensions(u, dims.data(), rank));
    Ort::ThrowOnError(api.GetSymbolicDimensions(u, symbols.data(), rank));
    for (size_t i = 0; i < rank; ++i)
      if (dims[i] < 0 && (symbols[i] == nullptr || *symbols[i] == '\0')) return;  // would be taken for the number -1
    Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, 0, u));
  });
}

OrtStatus* RunKernel(void* kernel, OrtKernelContext* context) noexcept {
  const auto& scan = *static_cast<const SelectiveScanKernel*>(kernel);
  return Guard(scan.node(), [&] { scan.Compute(context); });
}

}  // namespace

SelectiveScanOp::SelectiveScanOp(ONNXTensorElementDataType io_type, bool infer_shapes) : OrtCustomOp{}, io(io_type) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp*) { return "SelectiveScan"; };
  GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's

  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
  GetInputType = [](const OrtCustomOp* op, size_t index) {
    return index == kU ? static_cast<const SelectiveScanOp*>(op)->io : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return kInputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };

  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetOutputType = [](const OrtCustomOp* op, size_t) { return static_cast<const SelectiveScanOp*>(op)->io; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };

  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };

  if (infer_shapes) InferOutputShapeFn = InferShape;
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<SelectiveScanKernel*>(kernel); };
}

}  // namespace vim::ort
