// The ops of the vim domain: a row for each.
#include "op.h"

namespace vim::ort {
namespace {

constexpr auto kIo = TensorRule::kIo;
constexpr auto kFloat32 = TensorRule::kFloat32;

template <typename Desc>
void Ask(int (*supports)(const Desc*, char*, size_t), const Desc& desc) {
  char reason[256];
  if (!supports(&desc, reason, sizeof reason)) Refuse(reason);
}

namespace selective_scan {

enum Input { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias };
enum Attribute { kDeltaSoftplus, kReverse };

vim_selective_scan_desc Describe(const Call& call) {
  vim_selective_scan_desc desc = {};
  desc.batch = call.sizes[kBatch];
  desc.length = call.sizes[kLength];
  desc.channels = call.sizes[kChannels];
  desc.states = call.sizes[kStates];
  desc.groups = call.sizes[kGroups];
  desc.io = call.io;
  desc.delta_softplus = call.attributes[kDeltaSoftplus] != 0;
  desc.reverse = call.attributes[kReverse] != 0;
  desc.has_D = call.inputs[kD] != nullptr;
  desc.has_z = call.inputs[kZ] != nullptr;
  desc.has_delta_bias = call.inputs[kDeltaBias] != nullptr;
  vim_selective_scan_contiguous(&desc);
  return desc;
}

void Check(const Call& call) { Ask(vim_selective_scan_supports, Describe(call)); }

vim_status Run(const Call& call, const Backend& backend, const Ort::KernelContext& context) {
  vim_selective_scan_args args = {};
  args.u = call.inputs[kU];
  args.delta = call.inputs[kDelta];
  args.A = call.Float32(kA);
  args.B = call.inputs[kB];
  args.C = call.inputs[kC];
  args.D = call.Float32(kD);
  args.z = call.inputs[kZ];
  args.delta_bias = call.Float32(kDeltaBias);
  args.y = call.outputs[0];
  return backend.selective_scan(Describe(call), args, context);
}

}  // namespace selective_scan

namespace bi_selective_scan {

// The forward one of a pair; the backward one follows.
enum Input { kU = 0, kDelta = 2, kA = 4, kX = 6, kD = 8, kZ = 10, kDeltaBias = 11, kYScale = 13 };
enum Attribute { kDeltaSoftplus };

vim_bi_selective_scan_desc Describe(const Call& call) {
  vim_bi_selective_scan_desc desc = {};
  desc.batch = call.sizes[kBatch];
  desc.length = call.sizes[kLength];
  desc.channels = call.sizes[kChannels];
  desc.states = call.sizes[kStates];
  desc.groups = 1;
  desc.io = call.io;
  desc.delta_softplus = call.attributes[kDeltaSoftplus] != 0;
  desc.has_D = desc.has_z = desc.has_delta_bias = 1;
  desc.has_y_scale = call.inputs[kYScale] != nullptr;
  vim_bi_selective_scan_contiguous(&desc, call.sizes[kRow], call.sizes[kWidth]);
  return desc;
}

void Check(const Call& call) {
  const int64_t states = call.sizes[kStates], channels = call.sizes[kChannels];
  if (call.sizes[kRow] < 2 * states)
    Refuse("x_f and x_b have rows of ", call.sizes[kRow], "; they must hold B and C, ", states, " states each");
  if (call.sizes[kWidth] < channels)
    Refuse("z has rows of ", call.sizes[kWidth], "; they must hold ", channels, " channels");
  Ask(vim_bi_selective_scan_supports, Describe(call));
}

vim_status Run(const Call& call, const Backend& backend, const Ort::KernelContext& context) {
  const int64_t states = call.sizes[kStates], row = call.sizes[kRow];
  vim_bi_selective_scan_args args = {};
  for (int i = 0; i < 2; ++i) {
    args.u[i] = call.inputs[kU + i];
    args.delta[i] = call.inputs[kDelta + i];
    args.A[i] = call.Float32(kA + i);
    args.B[i] = call.Io(kX + i, row - 2 * states);
    args.C[i] = call.Io(kX + i, row - states);
    args.D[i] = call.Float32(kD + i);
    args.delta_bias[i] = call.Float32(kDeltaBias + i);
  }
  args.z = call.Io(kZ, call.sizes[kWidth] - call.sizes[kChannels]);
  args.y_scale = call.Float32(kYScale);
  args.y = call.outputs[0];
  return backend.bi_selective_scan(Describe(call), args, context);
}

}  // namespace bi_selective_scan

namespace bi_causal_conv1d {

enum Input { kX, kWeightF, kBiasF, kWeightB, kBiasB };

vim_bi_causal_conv1d_desc Describe(const Call& call) {
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

void Check(const Call& call) {
  if (call.sizes[kWidth] < call.sizes[kChannels])
    Refuse("x has rows of ", call.sizes[kWidth], "; they must hold ", call.sizes[kChannels], " channels");
  Ask(vim_bi_causal_conv1d_supports, Describe(call));
}

vim_status Run(const Call& call, const Backend& backend, const Ort::KernelContext& context) {
  const vim_bi_causal_conv1d_args args = {call.inputs[kX],
                                          {call.Float32(kWeightF), call.Float32(kWeightB)},
                                          {call.Float32(kBiasF), call.Float32(kBiasB)},
                                          {call.outputs[0], call.outputs[1]}};
  return backend.bi_causal_conv1d(Describe(call), args, context);
}

}  // namespace bi_causal_conv1d

namespace add_rms_norm {

enum Input { kH, kR, kWeight };
enum Attribute { kEpsilon };

vim_add_rms_norm_desc Describe(const Call& call) {
  return {call.sizes[kLeading], call.sizes[kChannels], call.io, call.attributes[kEpsilon]};
}

void Check(const Call& call) { Ask(vim_add_rms_norm_supports, Describe(call)); }

vim_status Run(const Call& call, const Backend& backend, const Ort::KernelContext& context) {
  const vim_add_rms_norm_args args = {call.inputs[kH], call.Float32(kR), call.Float32(kWeight), call.outputs[0],
                                      static_cast<float*>(call.outputs[1])};
  return backend.add_rms_norm(Describe(call), args, context);
}

// r_out may be r.
size_t InPlace(int** input, int** output) {
  *input = new int[1]{kR};
  *output = new int[1]{1};
  return 1;
}

}  // namespace add_rms_norm

}  // namespace

const Op kOps[kOpCount] = {
    {"SelectiveScan",
     {{"u", kIo, {kBatch, kLength, kChannels}},
      {"delta", kIo, {kBatch, kLength, kChannels}},
      {"A", kFloat32, {kChannels, kStates}},
      {"B", kIo, {kBatch, kLength, kGroups, kStates}},
      {"C", kIo, {kBatch, kLength, kGroups, kStates}},
      {"D", kFloat32, {kChannels}, true},
      {"z", kIo, {kBatch, kLength, kChannels}, true},
      {"delta_bias", kFloat32, {kChannels}, true}},
     {{"y", kIo, {kBatch, kLength, kChannels}}},
     {{"delta_softplus", AttributeRule::kFlag, 1}, {"reverse", AttributeRule::kFlag, 0}},
     nullptr,
     selective_scan::Check,
     selective_scan::Run},
    {"BiSelectiveScan",
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
     {{"y", kIo, {kBatch, kLength, kChannels}}},
     {{"delta_softplus", AttributeRule::kFlag, 1}},
     nullptr,
     bi_selective_scan::Check,
     bi_selective_scan::Run},
    {"BiCausalConv1d",
     {{"x", kIo, {kBatch, kLength, kWidth}},
      {"weight_f", kFloat32, {kTaps, kChannels}},
      {"bias_f", kFloat32, {kChannels}},
      {"weight_b", kFloat32, {kTaps, kChannels}},
      {"bias_b", kFloat32, {kChannels}}},
     {{"u_f", kIo, {kBatch, kLength, kChannels}}, {"u_b", kIo, {kBatch, kLength, kChannels}}},
     {},
     nullptr,
     bi_causal_conv1d::Check,
     bi_causal_conv1d::Run},
    {"AddRMSNorm",
     {{"h", kIo, {kLeading, kChannels}}, {"r", kFloat32, {kLeading, kChannels}}, {"weight", kFloat32, {kChannels}}},
     {{"n", kIo, {kLeading, kChannels}}, {"r_out", kFloat32, {kLeading, kChannels}}},
     {{"epsilon", AttributeRule::kNumber, 1e-5f}},
     add_rms_norm::InPlace,
     add_rms_norm::Check,
     add_rms_norm::Run},
};

}  // namespace vim::ort
