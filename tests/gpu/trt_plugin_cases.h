// One example of each op for trt_plugin_host.cc: shapes, types, attributes, inputs, and outputs in double precision
// from the definitions (docs/reference), not from any kernel.
#ifndef VIMDEPLOY_TESTS_GPU_TRT_PLUGIN_CASES_H_
#define VIMDEPLOY_TESTS_GPU_TRT_PLUGIN_CASES_H_

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

// So long that the scans of so few channels ask for a workspace.
constexpr int64_t kBatch = 2, kLength = 1500, kChannels = 48, kStates = 16, kRank = 12, kTaps = 4;
constexpr int64_t kRow = kRank + 2 * kStates, kWidth = 2 * kChannels;

using Values = std::vector<float>;
using Outputs = std::vector<std::vector<double>>;

struct Example {
  std::string name;
  std::vector<int64_t> shape;
  bool float32 = false;
  enum { kNormal, kDecay } values = kNormal;  // kDecay: negative, as A is
};

struct Case {
  std::string op;
  std::vector<Example> inputs, outputs;
  std::vector<std::pair<std::string, float>> numbers;  // attributes
  std::vector<std::pair<std::string, int32_t>> flags;
  std::string attributes;  // as the timing-cache ID writes them
  int required;            // inputs
  std::function<Outputs(const std::vector<Values>&)> golden;
};

inline double Silu(double x) { return x / (1 + std::exp(-x)); }

// One direction without the gate; B and C at `b` and `c` of rows of `row`.
inline std::vector<double> Scan(const Values& u, const Values& delta, const Values& A, const Values& rows_b, int64_t b,
                                const Values& rows_c, int64_t c, int64_t row, const Values& D, const Values& bias,
                                bool reverse) {
  std::vector<double> y(u.size());
  for (int64_t i = 0; i < kBatch; ++i) {
    for (int64_t d = 0; d < kChannels; ++d) {
      double state[kStates] = {};
      for (int64_t walk = 0; walk < kLength; ++walk) {
        const int64_t token = i * kLength + (reverse ? kLength - 1 - walk : walk), at = token * kChannels + d;
        const double step = std::log1p(std::exp(double{delta[at]} + bias[d]));
        y[at] = double{D[d]} * u[at];
        for (int64_t n = 0; n < kStates; ++n) {
          state[n] = std::exp(step * A[d * kStates + n]) * state[n] + step * u[at] * rows_b[token * row + b + n];
          y[at] += rows_c[token * row + c + n] * state[n];
        }
      }
    }
  }
  return y;
}

inline Outputs GoldenScan(const std::vector<Values>& in) {
  auto y = Scan(in[0], in[1], in[2], in[3], 0, in[4], 0, kStates, in[5], in[7], true);
  for (size_t i = 0; i < y.size(); ++i) y[i] *= Silu(in[6][i]);
  return {y};
}

inline Outputs GoldenBiScan(const std::vector<Values>& in) {
  auto y = Scan(in[0], in[2], in[4], in[6], kRank, in[6], kRank + kStates, kRow, in[8], in[11], false);
  const auto back = Scan(in[1], in[3], in[5], in[7], kRank, in[7], kRank + kStates, kRow, in[9], in[12], true);
  for (int64_t token = 0; token < kBatch * kLength; ++token)
    for (int64_t d = 0; d < kChannels; ++d) {
      double& each = y[token * kChannels + d];
      each = (each + back[token * kChannels + d]) * Silu(in[10][token * kWidth + kWidth - kChannels + d]) * in[13][d];
    }
  return {y};
}

inline Outputs GoldenConv(const std::vector<Values>& in) {
  Outputs u(2, std::vector<double>(kBatch * kLength * kChannels));
  for (int64_t i = 0; i < kBatch; ++i)
    for (int64_t t = 0; t < kLength; ++t)
      for (int64_t d = 0; d < kChannels; ++d)
        for (int back = 0; back < 2; ++back) {
          double sum = in[back ? 4 : 2][d];
          for (int64_t k = 0; k < kTaps; ++k) {
            const int64_t from = back ? t + (kTaps - 1) - k : t - (kTaps - 1) + k;
            if (from >= 0 && from < kLength)
              sum += double{in[back ? 3 : 1][k * kChannels + d]} * in[0][(i * kLength + from) * kWidth + d];
          }
          u[back][(i * kLength + t) * kChannels + d] = Silu(sum);
        }
  return u;
}

inline Outputs GoldenNorm(const std::vector<Values>& in) {
  const int64_t rows = kBatch * kLength;
  Outputs out(2, std::vector<double>(rows * kChannels));
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t c = 0; c < kChannels; ++c) {
      const double sum = double{in[0][row * kChannels + c]} + in[1][row * kChannels + c];
      out[1][row * kChannels + c] = sum;
      squares += sum * sum;
    }
    for (int64_t c = 0; c < kChannels; ++c)
      out[0][row * kChannels + c] = out[1][row * kChannels + c] / std::sqrt(squares / kChannels + 0.25f) * in[2][c];
  }
  return out;
}

inline std::vector<Case> Cases() {
  const std::vector<int64_t> tokens = {kBatch, kLength, kChannels}, vector = {kChannels}, matrix = {kChannels, kStates},
                             rows = {kBatch, kLength, kRow}, wide = {kBatch, kLength, kWidth},
                             taps = {kTaps, kChannels}, states = {kBatch, kLength, 1, kStates};
  const auto decay = Example::kDecay;
  return {
      {"SelectiveScan",
       {{"u", tokens},
        {"delta", tokens},
        {"A", matrix, true, decay},
        {"B", states},
        {"C", states},
        {"D", vector, true},
        {"z", tokens},
        {"delta_bias", vector, true}},
       {{"y", tokens}},
       {},
       {{"delta_softplus", 1}, {"reverse", 1}},
       "delta_softplus=1,reverse=1",
       5,
       GoldenScan},
      {"BiSelectiveScan",
       {{"u_f", tokens},
        {"u_b", tokens},
        {"delta_f", tokens},
        {"delta_b", tokens},
        {"A_f", matrix, true, decay},
        {"A_b", matrix, true, decay},
        {"x_f", rows},
        {"x_b", rows},
        {"D_f", vector, true},
        {"D_b", vector, true},
        {"z", wide},
        {"delta_bias_f", vector, true},
        {"delta_bias_b", vector, true},
        {"y_scale", vector, true}},
       {{"y", tokens}},
       {},
       {{"delta_softplus", 1}},
       "delta_softplus=1",
       13,
       GoldenBiScan},
      {"BiCausalConv1d",
       {{"x", wide},
        {"weight_f", taps, true},
        {"bias_f", vector, true},
        {"weight_b", taps, true},
        {"bias_b", vector, true}},
       {{"u_f", tokens}, {"u_b", tokens}},
       {},
       {},
       "",
       5,
       GoldenConv},
      {"AddRMSNorm",
       {{"h", tokens}, {"r", tokens, true}, {"weight", vector, true}},
       {{"n", tokens}, {"r_out", tokens, true}},
       {{"epsilon", 0.25f}},
       {},
       "epsilon=0.25",
       3,
       GoldenNorm},
  };
}

inline Values RandomValues(const Example& example, std::mt19937* random) {
  int64_t count = 1;
  for (const int64_t side : example.shape) count *= side;
  std::normal_distribution<float> normal;
  Values values(count);
  for (float& value : values) value = example.values == Example::kDecay ? -std::exp(normal(*random)) : normal(*random);
  return values;
}

#endif  // VIMDEPLOY_TESTS_GPU_TRT_PLUGIN_CASES_H_
