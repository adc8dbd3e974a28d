// The ops, one after another: their contract (docs/reference, design.md "The op"), then the kernel's descriptor and
// pointers from a call that fits it.
#include "op.h"
#include "vim/add_rms_norm.h"
#include "vim/bi_causal_conv1d.h"
#include "vim/bi_selective_scan.h"
#include "vim/selective_scan_cuda.h"

namespace vim::trt {
namespace {

constexpr TensorRule::Type kIo = TensorRule::kIo, kFloat32 = TensorRule::kFloat32;

// The kernel's own answer, with its reason.
template <typename Desc>
bool Ask(int (*supports)(const Desc*, char*, size_t), const Desc& desc, std::string* error) {
  char reason[256];
  if (supports(&desc, reason, sizeof reason)) return true;
  *error = reason;
  return false;
}

// Inputs by the order of the op's rules.
class Pointers {
 public:
  Pointers(const Call& call, const void* const* inputs) : call_(call), inputs_(inputs) {}
  const void* Io(int32_t rule) const { return call_.at[rule] < 0 ? nullptr : inputs_[call_.at[rule]]; }
  const void* Io(int32_t rule, int64_t first_element) const {
    return static_cast<const char*>(Io(rule)) + first_element * (call_.io == VIM_F32 ? 4 : 2);
  }
  const float* Float32(int32_t rule) const { return static_cast<const float*>(Io(rule)); }

 private:
  const Call& call_;
  const void* const* inputs_;
};

size_t NoWorkspace(const Call&) { return 0; }

// What any batch up to this one needs: TensorRT asks for the largest, and large ones need none.
template <typename Desc>
size_t MostWorkspace(Desc desc, size_t (*workspace)(const Desc*)) {
  for (; desc.batch > 0; --desc.batch)
    if (const size_t bytes = workspace(&desc)) return bytes;
  return 0;
}

namespace selective_scan {

enum : int32_t { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias };

vim_selective_scan_desc Desc(const Call& call) {
  vim_selective_scan_desc desc = {};
  desc.batch = call.sizes[kBatch];
  desc.length = call.sizes[kLength];
  desc.channels = call.sizes[kChannels];
  desc.states = call.sizes[kStates];
  desc.groups = call.sizes[kGroups];
  desc.io = call.io;
  desc.delta_softplus = call.attributes[0].flag;
  desc.reverse = call.attributes[1].flag;
  desc.has_D = call.at[kD] >= 0;
  desc.has_z = call.at[kZ] >= 0;
  desc.has_delta_bias = call.at[kDeltaBias] >= 0;
  vim_selective_scan_contiguous(&desc);
  return desc;
}

bool Supports(const Call& call, std::string* error) { return Ask(vim_selective_scan_supports, Desc(call), error); }

size_t Workspace(const Call& call) { return MostWorkspace(Desc(call), vim_selective_scan_cuda_workspace); }

vim_status Run(const Call& call, const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
  const vim_selective_scan_desc desc = Desc(call);
  const Pointers in(call, inputs);
  vim_selective_scan_args args = {};
  args.u = in.Io(kU);
  args.delta = in.Io(kDelta);
  args.A = in.Float32(kA);
  args.B = in.Io(kB);
  args.C = in.Io(kC);
  args.D = in.Float32(kD);
  args.z = in.Io(kZ);
  args.delta_bias = in.Float32(kDeltaBias);
  args.y = outputs[0];
  return vim_selective_scan_cuda(&desc, &args, workspace, stream);
}

}  // namespace selective_scan

namespace bi_selective_scan {

// _f of a pair; _b follows.
enum : int32_t { kU = 0, kDelta = 2, kA = 4, kX = 6, kD = 8, kZ = 10, kDeltaBias = 11, kYScale = 13 };

vim_bi_selective_scan_desc Desc(const Call& call) {
  vim_bi_selective_scan_desc desc = {};
  desc.batch = call.sizes[kBatch];
  desc.length = call.sizes[kLength];
  desc.channels = call.sizes[kChannels];
  desc.states = call.sizes[kStates];
  desc.groups = 1;
  desc.io = call.io;
  desc.delta_softplus = call.attributes[0].flag;
  desc.has_D = desc.has_z = desc.has_delta_bias = 1;
  desc.has_y_scale = call.at[kYScale] >= 0;
  vim_bi_selective_scan_contiguous(&desc, call.sizes[kRow], call.sizes[kWidth]);
  return desc;
}

bool Supports(const Call& call, std::string* error) {
  const int64_t states = call.sizes[kStates], row = call.sizes[kRow];
  if (row < 2 * states) {
    *error = "x_f and x_b have rows of " + std::to_string(row) + "; they must hold B and C, " + std::to_string(states) +
             " states each";
    return false;
  }
  if (call.sizes[kWidth] < call.sizes[kChannels]) {
    *error = "z has rows of " + std::to_string(call.sizes[kWidth]) + "; they must hold " +
             std::to_string(call.sizes[kChannels]) + " channels";
    return false;
  }
  return Ask(vim_bi_selective_scan_supports, Desc(call), error);
}

size_t Workspace(const Call& call) { return MostWorkspace(Desc(call), vim_bi_selective_scan_cuda_workspace); }

vim_status Run(const Call& call, const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
  const vim_bi_selective_scan_desc desc = Desc(call);
  const Pointers in(call, inputs);
  const int64_t states = call.sizes[kStates], row = call.sizes[kRow];
  vim_bi_selective_scan_args args = {};
  for (int32_t i = 0; i < 2; ++i) {
    args.u[i] = in.Io(kU + i);
    args.delta[i] = in.Io(kDelta + i);
    args.A[i] = in.Float32(kA + i);
    args.B[i] = in.Io(kX + i, row - 2 * states);
    args.C[i] = in.Io(kX + i, row - states);
    args.D[i] = in.Float32(kD + i);
    args.delta_bias[i] = in.Float32(kDeltaBias + i);
  }
  args.z = in.Io(kZ, call.sizes[kWidth] - call.sizes[kChannels]);
  args.y_scale = in.Float32(kYScale);
  args.y = outputs[0];
  return vim_bi_selective_scan_cuda(&desc, &args, workspace, stream);
}

}  // namespace bi_selective_scan

namespace bi_causal_conv1d {

enum : int32_t { kX, kWeightF, kBiasF, kWeightB, kBiasB };

vim_bi_causal_conv1d_desc Desc(const Call& call) {
  vim_bi_causal_conv1d_desc desc = {};
  desc.batch = call.sizes[kBatch];
  desc.length = call.sizes[kLength];
  desc.channels = call.sizes[kChannels];
  desc.taps = call.sizes[kTaps];
  desc.io = call.io;
  desc.x_token_stride = call.sizes[kWidth];
  desc.x_batch_stride = call.sizes[kLength] * call.sizes[kWidth];
  return desc;
}

bool Supports(const Call& call, std::string* error) {
  if (call.sizes[kWidth] < call.sizes[kChannels]) {
    *error = "x has rows of " + std::to_string(call.sizes[kWidth]) + "; they must hold " +
             std::to_string(call.sizes[kChannels]) + " channels";
    return false;
  }
  return Ask(vim_bi_causal_conv1d_supports, Desc(call), error);
}

vim_status Run(const Call& call, const void* const* inputs, void* const* outputs, void* /*workspace*/, void* stream) {
  const vim_bi_causal_conv1d_desc desc = Desc(call);
  const Pointers in(call, inputs);
  const vim_bi_causal_conv1d_args args = {in.Io(kX),
                                          {in.Float32(kWeightF), in.Float32(kWeightB)},
                                          {in.Float32(kBiasF), in.Float32(kBiasB)},
                                          {outputs[0], outputs[1]}};
  return vim_bi_causal_conv1d_cuda(&desc, &args, stream);
}

}  // namespace bi_causal_conv1d

namespace add_rms_norm {

enum : int32_t { kH, kR, kWeight };

vim_add_rms_norm_desc Desc(const Call& call) {
  return {call.sizes[kLeading], call.sizes[kChannels], call.io, call.attributes[0].number};
}

bool Supports(const Call& call, std::string* error) { return Ask(vim_add_rms_norm_supports, Desc(call), error); }

vim_status Run(const Call& call, const void* const* inputs, void* const* outputs, void* /*workspace*/, void* stream) {
  const vim_add_rms_norm_desc desc = Desc(call);
  const Pointers in(call, inputs);
  const vim_add_rms_norm_args args = {in.Io(kH), in.Float32(kR), in.Float32(kWeight), outputs[0],
                                      static_cast<float*>(outputs[1])};
  return vim_add_rms_norm_cuda(&desc, &args, stream);
}

}  // namespace add_rms_norm

constexpr AttributeRule Flag(const char* name, int32_t absent) { return {name, AttributeRule::kFlag, {absent}}; }

constexpr AttributeRule Number(const char* name, float absent) {
  AttributeRule rule = {name, AttributeRule::kNumber, {}};
  rule.absent.number = absent;
  return rule;
}

}  // namespace

constexpr Op kOps[kOpCount] = {
    {"SelectiveScan",
     8,
     {{"u", kIo, {kBatch, kLength, kChannels}},
      {"delta", kIo, {kBatch, kLength, kChannels}},
      {"A", kFloat32, {kChannels, kStates}},
      {"B", kIo, {kBatch, kLength, kGroups, kStates}},
      {"C", kIo, {kBatch, kLength, kGroups, kStates}},
      {"D", kFloat32, {kChannels}, true},
      {"z", kIo, {kBatch, kLength, kChannels}, true},
      {"delta_bias", kFloat32, {kChannels}, true}},
     1,
     {{"y", kIo, {kBatch, kLength, kChannels}}},
     2,
     {Flag("delta_softplus", 1), Flag("reverse", 0)},
     selective_scan::Supports,
     selective_scan::Workspace,
     selective_scan::Run},
    {"BiSelectiveScan",
     14,
     {{"u_f", kIo, {kBatch, kLength, kChannels}},
      {"u_b", kIo, {kBatch, kLength, kChannels}},
      {"delta_f", kIo, {kBatch, kLength, kChannels}},
      {"delta_b", kIo, {kBatch, kLength, kChannels}},
      {"A_f", kFloat32, {kChannels, kStates}},
      {"A_b", kFloat32, {kChannels, kStates}},
      {"x_f", kIo, {kBatch, kLength, kRow}},
      {"x_b", kIo, {kBatch, kLength, kRow}},
      {"D_f", kFloat32, {kChannels}},
      {"D_b", kFloat32, {kChannels}},
      {"z", kIo, {kBatch, kLength, kWidth}},
      {"delta_bias_f", kFloat32, {kChannels}},
      {"delta_bias_b", kFloat32, {kChannels}},
      {"y_scale", kFloat32, {kChannels}, true}},
     1,
     {{"y", kIo, {kBatch, kLength, kChannels}}},
     1,
     {Flag("delta_softplus", 1)},
     bi_selective_scan::Supports,
     bi_selective_scan::Workspace,
     bi_selective_scan::Run},
    {"BiCausalConv1d",
     5,
     {{"x", kIo, {kBatch, kLength, kWidth}},
      {"weight_f", kFloat32, {kTaps, kChannels}},
      {"bias_f", kFloat32, {kChannels}},
      {"weight_b", kFloat32, {kTaps, kChannels}},
      {"bias_b", kFloat32, {kChannels}}},
     2,
     {{"u_f", kIo, {kBatch, kLength, kChannels}}, {"u_b", kIo, {kBatch, kLength, kChannels}}},
     0,
     {},
     bi_causal_conv1d::Supports,
     NoWorkspace,
     bi_causal_conv1d::Run},
    {"AddRMSNorm",
     3,
     {{"h", kIo, {kLeading, kChannels}}, {"r", kFloat32, {kLeading, kChannels}}, {"weight", kFloat32, {kChannels}}},
     2,
     {{"n", kIo, {kLeading, kChannels}}, {"r_out", kFloat32, {kLeading, kChannels}}},
     1,
     {Number("epsilon", 1e-5f)},
     add_rms_norm::Supports,
     NoWorkspace,
     add_rms_norm::Run},
};

}  // namespace vim::trt
