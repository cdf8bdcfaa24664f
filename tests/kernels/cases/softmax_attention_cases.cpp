#include <algorithm>

#include "kernels/ops/softmax_attention.h"
#include "tests/kernels/cases/attention_cases.h"

namespace support {

namespace {

using kernels::Context;

int64_t longest(const std::vector<double>& boundaries) {
  double longest = 0;
  for (size_t s = 0; s + 1 < boundaries.size(); ++s)
    longest = std::max(longest, boundaries[s + 1] - boundaries[s]);
  return static_cast<int64_t>(longest);
}

// Forward: probabilities are rounded to the compute type before they meet v, which moves o by at most u times
// the largest |v|, at most twice the largest |o| (the first row of a sequence is its v).
// Backward: o is rounded on its way into do . o, a sum over the width, which moves dq and dk by up to
// u sum |do o| |k| / sqrt(D): about u times the width.
// A score of up to 16 is off by 16 of fp32's units, and its exponential with it.
OpCase softmax_case(std::string name, const AttentionShape& s, const kernels::AttentionHints& hints = {}) {
  OpCase op = attention_case("softmax_attention", std::move(name), s);
  const OpOutput log_sum{
      .name = "log_sum", .shape = {s.rows(), s.heads}, .type = Type::main, .differentiable = false};
  // Where sequences are uniform its order is the device's own: working memory, not a result.
  if (hints.uniform) {
    op.inputs.push_back({.name = log_sum.name, .shape = log_sum.shape, .type = log_sum.type});
  } else {
    op.outputs.push_back(log_sum);
  }
  op.forward = [hints](const Context& ctx, const OpTensors& t) {
    kernels::softmax_attention(ctx, t["q"], t["k"], t["v"], t["cu_seqlens"], t["o"], t["log_sum"], hints);
  };
  op.backward = [hints](const Context& ctx, const OpTensors& t) {
    kernels::softmax_attention_backward(ctx, t["do"], t["q"], t["k"], t["v"], t["o"], t["log_sum"],
                                        t["cu_seqlens"], t["dq"], t["dk"], t["dv"], hints);
  };
  op.forward_roundings = 3;
  op.backward_roundings = 2 + static_cast<double>(s.width);
  op.sum_length = 4 * (s.width + longest(s.cu_seqlens) + 16);
  return op;
}

// Larger ones, where a GPU leaves its first tile; few elements meet central differences.
OpCase large_case(std::string name, const AttentionShape& s, const kernels::AttentionHints& hints = {}) {
  OpCase op = softmax_case(std::move(name), s, hints);
  op.checked_elements = 6;
  return op;
}

std::vector<double> singles(int count, int pair_at) {
  std::vector<double> boundaries = {0};
  for (int i = 0; i < count; ++i) boundaries.push_back(boundaries.back() + (i == pair_at ? 3 : 1));
  return boundaries;
}

}  // namespace

std::vector<OpCase> softmax_attention_cases() {
  return {
      softmax_case("one_sequence", {.heads = 2, .key_heads = 2, .width = 8, .cu_seqlens = {0, 9}}),
      softmax_case("packed_ragged",
                   {.heads = 2, .key_heads = 1, .width = 4, .cu_seqlens = {0, 1, 1, 6, 9}, .padding = 8}),
      softmax_case("odd_width_groups",
                   {.heads = 4, .key_heads = 2, .width = 5, .cu_seqlens = {0, 3, 8}, .padding = 3}),
      softmax_case("two_tiles", {.heads = 1, .key_heads = 1, .width = 2, .cu_seqlens = {0, 67}}),
      softmax_case(
          "rows_outside",
          {.heads = 2, .key_heads = 1, .width = 8, .cu_seqlens = {2, 7, 7, 12}, .padding = 8, .outside = 3}),
      large_case("ragged_groups",
                 {.heads = 4,
                  .key_heads = 2,
                  .width = 64,
                  .cu_seqlens = {0, 200, 201, 201, 270},
                  .padding = 64,
                  .outside = 5},
                 {.longest = 200}),
      large_case("ragged_wide_heads",
                 {.heads = 2, .key_heads = 2, .width = 128, .cu_seqlens = {0, 131, 260}}),
      large_case("widest_heads", {.heads = 1, .key_heads = 1, .width = 256, .cu_seqlens = {0, 70}}),
      large_case("uniform",
                 {.heads = 4, .key_heads = 2, .width = 64, .cu_seqlens = {0, 128, 256}, .padding = 64},
                 {.longest = 128, .uniform = true}),
      large_case("uniform_wide_heads", {.heads = 1, .key_heads = 1, .width = 128, .cu_seqlens = {0, 256}},
                 {.longest = 256, .uniform = true, .deterministic = false}),
      large_case("uniform_odd_length", {.heads = 2, .key_heads = 1, .width = 64, .cu_seqlens = {0, 77, 154}},
                 {.longest = 77, .uniform = true}),
      large_case("many_sequences",
                 {.heads = 1, .key_heads = 1, .width = 2, .cu_seqlens = singles(65550, 40000)}),
  };
}

}  // namespace support
