#include "op.h"

#include <array>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace vim::ort {
namespace {

constexpr const char* kSizeNames[kSizeCount] = {"",       "...",    "batch", "length", "channels",
                                                "states", "groups", "row",   "width",  "taps"};

// Runs `body`; no exception leaves.
template <typename Body>
OrtStatus* Guard(const Op& op, const std::string& node, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Refusal& refusal) {
      const std::string text = "vim::" + std::string(op.name) + " '" + node + "': " + refusal.text;
      return Ort::Status(text.c_str(), ORT_INVALID_ARGUMENT).release();
    } catch (const Ort::Exception& error) {
      return Ort::Status(error).release();
    } catch (const std::exception& error) {
      return Ort::Status(error).release();
    }
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, "vim: out of memory while reporting an error");
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

vim_dtype ToVimType(const Op& op, ONNXTensorElementDataType io) {
  switch (io) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return VIM_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return VIM_F16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return VIM_BF16;
    default:
      Refuse(op.inputs[0].name, " is ", TypeName(io), "; it must be float32, float16 or bfloat16");
  }
}

void CheckType(const Op& op, const TensorRule& rule, ONNXTensorElementDataType type, ONNXTensorElementDataType io) {
  const bool float32 = rule.type == TensorRule::kFloat32;
  const ONNXTensorElementDataType wanted = float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : io;
  if (type != wanted)
    Refuse(rule.name, " is ", TypeName(type), "; it must be ", TypeName(wanted),
           float32 ? ", whatever the type of " : ", as ", op.inputs[0].name, float32 ? "" : " is");
}

struct Shape {
  int rank = 0;
  std::array<int64_t, kMaxRank> dims = {};
};

int Rank(const TensorRule& rule) {
  int rank = 0;
  while (rule.shape[rank] != kEnd) ++rank;
  return rank;
}

bool AnyRank(const TensorRule& rule) { return rule.shape[0] == kLeading; }

constexpr int64_t kUnknown = -1;

// Settles the sizes of a shape, or holds it against those settled before. `leading` is what kLeading stands for, the
// first dimensions of the first input.
bool BindShape(const TensorRule& rule, const Shape& shape, int64_t* sizes, Shape* leading) {
  int d = 0;
  if (AnyRank(rule)) {
    const int count = shape.rank - (Rank(rule) - 1);
    if (count < 0 || (sizes[kLeading] != kUnknown && count != leading->rank)) return false;
    int64_t product = 1;
    for (; d < count; ++d) {
      if (sizes[kLeading] != kUnknown && shape.dims[d] != leading->dims[d]) return false;
      leading->dims[d] = shape.dims[d];
      product *= shape.dims[d];
    }
    leading->rank = count;
    sizes[kLeading] = product;
  } else if (shape.rank != Rank(rule)) {
    return false;
  }
  for (int i = AnyRank(rule) ? 1 : 0; rule.shape[i] != kEnd; ++i, ++d) {
    int64_t& size = sizes[rule.shape[i]];
    if (size != kUnknown && size != shape.dims[d]) return false;
    size = shape.dims[d];
  }
  return true;
}

// "(names) = (values)", as far as earlier inputs have settled them.
std::string Wanted(const TensorRule& rule, const int64_t* sizes, const Shape& leading) {
  std::string names, values;
  const auto add = [](std::string* to, const std::string& text) { *to += (to->empty() ? "" : ", ") + text; };
  for (int i = 0; rule.shape[i] != kEnd; ++i) {
    const Size size = rule.shape[i];
    add(&names, kSizeNames[size]);
    if (sizes[size] == kUnknown)
      add(&values, kSizeNames[size]);
    else if (size != kLeading)
      add(&values, std::to_string(sizes[size]));
    else
      for (int d = 0; d < leading.rank; ++d) add(&values, std::to_string(leading.dims[d]));
  }
  return "(" + names + ")" + (names == values ? "" : " = (" + values + ")");
}

void CheckShape(const TensorRule& rule, const Shape& shape, int64_t* sizes, Shape* leading) {
  int64_t before[kSizeCount];
  std::copy(sizes, sizes + kSizeCount, before);
  const Shape leading_before = *leading;
  if (BindShape(rule, shape, sizes, leading)) return;
  std::string has;
  for (int d = 0; d < shape.rank; ++d) has += (d ? ", " : "") + std::to_string(shape.dims[d]);
  Refuse(rule.name, " has shape (", has, "); it must be ", Wanted(rule, before, leading_before));
}

float ReadAttribute(const OrtKernelInfo* info, const AttributeRule& rule) {
  const OrtApi& api = Ort::GetApi();
  const bool flag = rule.kind == AttributeRule::kFlag;
  int64_t whole = 0;
  float number = 0;
  size_t size = 0;
  const bool is_whole = Ort::Status(api.KernelInfoGetAttribute_int64(info, rule.name, &whole)).IsOK();
  const bool is_number = Ort::Status(api.KernelInfoGetAttribute_float(info, rule.name, &number)).IsOK();
  if (flag && is_whole) {
    if (whole != 0 && whole != 1) Refuse("attribute ", rule.name, " is ", whole, "; it must be 0 or 1");
    return static_cast<float>(whole);
  }
  if (!flag && is_number) return number;
  // ORT has one error for an attribute that is absent and for one of another type.
  if (is_whole || is_number || Ort::Status(api.KernelInfoGetAttribute_string(info, rule.name, nullptr, &size)).IsOK())
    Refuse("attribute ", rule.name, flag ? " is not an integer; it must be 0 or 1" : " is not a float");
  return rule.absent;
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

// A node of the graph.
class Kernel {
 public:
  Kernel(const CustomOp& custom, const OrtKernelInfo* info, std::string node)
      : op_(custom.op),
        backend_(custom.backend),
        io_(custom.io),
        vim_type_(ToVimType(op_, io_)),
        node_(std::move(node)) {
    if (backend_.check != nullptr) backend_.check();
    for (int i = 0; i < op_.attribute_count(); ++i) attributes_[i] = ReadAttribute(info, op_.attributes[i]);
    CheckTypes(info);
  }

  const Op& op() const { return op_; }
  const std::string& node() const { return node_; }

  void Compute(OrtKernelContext* ort_context) const {
    const Ort::KernelContext context(ort_context);
    Call call = {};
    call.io = vim_type_;
    call.attributes = attributes_.data();
    std::fill(call.sizes, call.sizes + kSizeCount, kUnknown);
    Shape leading;
    Bind(ort_context, &call, &leading);
    op_.check(call);
    for (int i = 0; i < op_.output_count(); ++i) call.outputs[i] = Output(ort_context, i, call, leading);
    const vim_status status = op_.run(call, backend_, context);
    if (status != VIM_OK)
      Refuse("the kernel returned status ", static_cast<int>(status), backend_.error != nullptr ? ": " : "",
             backend_.error != nullptr ? backend_.error() : "");
  }

 private:
  // At session creation, so that a wrong model is refused before it runs.
  void CheckTypes(const OrtKernelInfo* info) const {
    const OrtApi& api = Ort::GetApi();
    size_t given = 0;
    Ort::ThrowOnError(api.KernelInfo_GetInputCount(info, &given));
    for (int i = 0; i < op_.input_count() && i < static_cast<int>(given); ++i) {
      OrtTypeInfo* type_info = nullptr;
      // An input left out has no type, which ORT reports as an error.
      if (!Ort::Status(api.KernelInfo_GetInputTypeInfo(info, i, &type_info)).IsOK() || type_info == nullptr) continue;
      const Ort::TypeInfo owner(type_info);
      if (owner.GetONNXType() != ONNX_TYPE_TENSOR) Refuse(op_.inputs[i].name, " is not a tensor");
      CheckType(op_, op_.inputs[i], owner.GetTensorTypeAndShapeInfo().GetElementType(), io_);
    }
  }

  // All types first, then shapes in the order of the inputs.
  void Bind(OrtKernelContext* context, Call* call, Shape* leading) const {
    const OrtApi& api = Ort::GetApi();
    size_t given = 0;
    Ort::ThrowOnError(api.KernelContext_GetInputCount(context, &given));
    std::array<Shape, kMaxInputs> shapes;
    for (int i = 0; i < op_.input_count(); ++i) {
      const TensorRule& rule = op_.inputs[i];
      const OrtValue* value = nullptr;
      if (i < static_cast<int>(given)) Ort::ThrowOnError(api.KernelContext_GetInput(context, i, &value));
      if (value == nullptr) {
        if (!rule.optional) Refuse(rule.name, " is missing");
        continue;
      }
      OrtTensorTypeAndShapeInfo* made = nullptr;
      Ort::ThrowOnError(api.GetTensorTypeAndShape(value, &made));
      const Ort::TensorTypeAndShapeInfo info(made);
      CheckType(op_, rule, info.GetElementType(), io_);
      const size_t rank = info.GetDimensionsCount();
      if (rank > kMaxRank) Refuse(rule.name, " has ", rank, " dimensions; there may be at most ", kMaxRank);
      shapes[i].rank = static_cast<int>(rank);
      Ort::ThrowOnError(api.GetDimensions(info, shapes[i].dims.data(), rank));
      // The C interface has no pointer to const here; nothing is written to.
      void* data = nullptr;
      Ort::ThrowOnError(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
      call->inputs[i] = data;
      // ORT has no pointer for an empty tensor; null would mean that the input was left out.
      if (data == nullptr) call->inputs[i] = call;
    }
    for (int i = 0; i < op_.input_count(); ++i)
      if (call->inputs[i] != nullptr) CheckShape(op_.inputs[i], shapes[i], call->sizes, leading);
  }

  void* Output(OrtKernelContext* context, int index, const Call& call, const Shape& leading) const {
    const OrtApi& api = Ort::GetApi();
    const TensorRule& rule = op_.outputs[index];
    Shape shape = AnyRank(rule) ? leading : Shape();
    for (int i = AnyRank(rule) ? 1 : 0; rule.shape[i] != kEnd; ++i)
      shape.dims[shape.rank++] = call.sizes[rule.shape[i]];
    OrtValue* value = nullptr;
    void* data = nullptr;
    Ort::ThrowOnError(api.KernelContext_GetOutput(context, index, shape.dims.data(), shape.rank, &value));
    if (value == nullptr) Refuse("output ", rule.name, " is left out");
    Ort::ThrowOnError(api.GetTensorMutableData(value, &data));
    return data;
  }

  const Op& op_;
  const Backend& backend_;
  ONNXTensorElementDataType io_;
  vim_dtype vim_type_;
  std::array<float, kMaxAttributes> attributes_ = {};
  std::string node_;
};

OrtStatus* MakeKernel(const OrtCustomOp* op, const OrtApi* /*api*/, const OrtKernelInfo* info, void** kernel) noexcept {
  const auto& custom = *static_cast<const CustomOp*>(op);
  std::string node;
  *kernel = nullptr;
  OrtStatus* const no_name = Guard(custom.op, "", [&] { node = NodeName(info); });
  if (no_name != nullptr) return no_name;
  return Guard(custom.op, node, [&] { *kernel = new Kernel(custom, info, node); });
}

OrtStatus* RunKernel(void* kernel, OrtKernelContext* context) noexcept {
  const auto& one = *static_cast<const Kernel*>(kernel);
  return Guard(one.op(), one.node(), [&] { one.Compute(context); });
}

// A dimension as shape inference knows it: a number or a symbol.
struct Dim {
  int64_t value = kUnknown;
  std::string symbol;
  bool known() const { return value >= 0 || !symbol.empty(); }  // an empty symbol would be taken for the number -1
};

// Of input `index`; empty where it is not known.
std::vector<Dim> InputDims(const OrtShapeInferContext* context, size_t index) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));  // 0 too where the shape is not known
  std::vector<int64_t> values(rank);
  std::vector<const char*> symbols(rank);
  Ort::ThrowOnError(api.GetDimensions(info, values.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(info, symbols.data(), rank));
  std::vector<Dim> dims(rank);
  for (size_t i = 0; i < rank; ++i) dims[i] = {values[i], symbols[i] != nullptr ? symbols[i] : ""};
  return dims;
}

// The dimensions that `size` stands for, from the first input that has it and is not optional.
std::vector<Dim> DimsOf(const Op& op, const OrtShapeInferContext* context, Size size) {
  for (int i = 0; i < op.input_count() && !op.inputs[i].optional; ++i) {
    const TensorRule& rule = op.inputs[i];
    for (int at = 0; rule.shape[at] != kEnd; ++at) {
      if (rule.shape[at] != size) continue;
      const std::vector<Dim> dims = InputDims(context, i);
      const int leading = static_cast<int>(dims.size()) - (Rank(rule) - 1);
      if (AnyRank(rule) ? leading < 0 : static_cast<int>(dims.size()) != Rank(rule)) return {};
      if (size == kLeading) return {dims.begin(), dims.begin() + leading};
      return {dims[AnyRank(rule) ? leading + at - 1 : at]};
    }
  }
  return {};
}

// The type too, or the output has none. It is that of the first input: which of an op's objects ORT asks is not said.
ONNXTensorElementDataType OutputType(const OrtShapeInferContext* context, const TensorRule& rule) {
  if (rule.type == TensorRule::kFloat32) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  Ort::ThrowOnError(api.GetTensorElementType(info, &type));
  return type;
}

void SetOutput(OrtShapeInferContext* context, size_t index, ONNXTensorElementDataType type,
               const std::vector<Dim>& dims) {
  const OrtApi& api = Ort::GetApi();
  std::vector<int64_t> values;
  std::vector<const char*> symbols;
  for (const Dim& dim : dims) {
    values.push_back(dim.value);
    symbols.push_back(dim.symbol.c_str());
  }
  OrtTensorTypeAndShapeInfo* made = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&made));
  const Ort::TensorTypeAndShapeInfo info(made);
  Ort::ThrowOnError(api.SetTensorElementType(info, type));
  Ort::ThrowOnError(api.SetDimensions(info, values.data(), values.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(info, symbols.data(), symbols.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, index, info));
}

// ORT drops the status this returns, so there is no use in refusing here: what is not known stays so.
OrtStatus* InferShapes(const OrtCustomOp* custom, OrtShapeInferContext* context) noexcept {
  const Op& op = static_cast<const CustomOp*>(custom)->op;
  return Guard(op, "", [&] {
    for (int i = 0; i < op.output_count(); ++i) {
      std::vector<Dim> dims;
      bool known = true;
      for (int at = 0; op.outputs[i].shape[at] != kEnd; ++at) {
        const std::vector<Dim> some = DimsOf(op, context, op.outputs[i].shape[at]);
        known = known && (!some.empty() || op.outputs[i].shape[at] == kLeading);
        for (const Dim& dim : some) known = known && dim.known();
        dims.insert(dims.end(), some.begin(), some.end());
      }
      if (known) SetOutput(context, i, OutputType(context, op.outputs[i]), dims);
    }
  });
}

const CustomOp& Custom(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

OrtCustomOpInputOutputCharacteristic Characteristic(const TensorRule& rule) {
  return rule.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

}  // namespace

CustomOp::CustomOp(const Op& the_op, const Backend& the_backend, ONNXTensorElementDataType io_type, bool infer_shapes)
    : OrtCustomOp{}, op(the_op), backend(the_backend), io(io_type) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp* self) { return Custom(self).op.name; };
  GetExecutionProviderType = [](const OrtCustomOp* self) { return Custom(self).backend.provider; };

  GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<size_t>(Custom(self).op.input_count()); };
  GetInputType = [](const OrtCustomOp* self, size_t index) {
    return index == 0 ? Custom(self).io : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return Characteristic(Custom(self).op.inputs[index]);
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };

  GetOutputTypeCount = [](const OrtCustomOp* self) { return static_cast<size_t>(Custom(self).op.output_count()); };
  GetOutputType = [](const OrtCustomOp* self, size_t index) {
    const bool float32 = Custom(self).op.outputs[index].type == TensorRule::kFloat32;
    return float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : Custom(self).io;
  };
  GetOutputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return Characteristic(Custom(self).op.outputs[index]);
  };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };

  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };

  if (op.in_place != nullptr) {
    GetMayInplace = op.in_place;
    ReleaseMayInplace = [](int* input, int* output) {
      delete[] input;
      delete[] output;
    };
  }
  if (infer_shapes) InferOutputShapeFn = InferShapes;
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace vim::ort
