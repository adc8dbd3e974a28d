// vim::SelectiveScan as an ONNX Runtime custom op: reads a node and its tensors, checks them, calls the kernel.
#ifndef VIM_ONNXRUNTIME_SELECTIVE_SCAN_OP_H_
#define VIM_ONNXRUNTIME_SELECTIVE_SCAN_OP_H_

#include <onnxruntime_cxx_api.h>

#include <cstdint>

namespace vim::ort {

// The interface asked of the runtime, whatever the headers offer: a library built with newer ones loads in 1.21 too.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime 1.21 or newer are needed");

// One object for each type of u and y. The other inputs take any type, so that a wrong one is refused by us, with a
// sentence, and not by ORT's "no kernel def matches node inputs".
struct SelectiveScanOp : OrtCustomOp {
  // Before 1.24, ORT dereferences null when an op that infers shapes has an optional input left out (fixed by its pull
  // request 26199): there the op must not offer to.
  SelectiveScanOp(ONNXTensorElementDataType io, bool infer_shapes);

  ONNXTensorElementDataType io;
};

}  // namespace vim::ort

#endif  // VIM_ONNXRUNTIME_SELECTIVE_SCAN_OP_H_
