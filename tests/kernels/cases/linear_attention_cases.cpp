#include <algorithm>

#include "kernels/ops/linear_attention.h"
#include "tests/kernels/cases/attention_cases.h"

namespace support {

namespace {

using kernels::Context;
using kernels::LinearAttentionParams;

// Backward: o is rounded on its way into do . o, a sum over the width, which moves dq by up to
// u sum |do o|: about u times the width. The un-normalised output is of the main type, nothing is rounded.
OpCase linear_case(std::string name, LinearAttentionParams params, const AttentionShape& s) {
  OpCase op = attention_case("linear_attention", std::move(name), s);
  if (!params.normalise) op.outputs[0].type = Type::main;
  if (params.normalise)
    op.outputs.push_back(
        {.name = "denominator", .shape = {s.rows(), s.heads}, .type = Type::main, .differentiable = false});
  const auto denominator = [params](const OpTensors& t) {
    return params.normalise ? t["denominator"] : kernels::Tensor{};
  };
  op.forward = [=](const Context& ctx, const OpTensors& t) {
    kernels::linear_attention(ctx, params, t["q"], t["k"], t["v"], t["cu_seqlens"], t["o"], denominator(t));
  };
  op.backward = [=](const Context& ctx, const OpTensors& t) {
    kernels::linear_attention_backward(ctx, params, t["do"], t["q"], t["k"], t["v"], t["o"], denominator(t),
                                       t["cu_seqlens"], t["dq"], t["dk"], t["dv"]);
  };
  op.backward_roundings = params.normalise ? 2 + static_cast<double>(s.width) : 1;
  op.sum_length = 4 * (s.width + s.rows());
  return op;
}

// Sizes that matrix units take. There phi(q), phi(k), the products P and the state S are rounded to the
// compute type on their way into a product, at most three of them in a row; each moves the result by up to u
// sum |w v|, and the weights w sum to one. Backward: the products do . v are one more.
std::vector<OpCase> matrix_unit_cases(LinearAttentionParams params, const std::string& kind) {
  std::vector<OpCase> cases = {
      linear_case(kind + "_width_64_groups", params,
                  {.heads = 2, .key_heads = 1, .width = 64, .cu_seqlens = {0, 1, 65, 300}, .padding = 8}),
      linear_case(kind + "_width_128", params,
                  {.heads = 2, .key_heads = 2, .width = 128, .cu_seqlens = {3, 130, 130, 290}}),
      linear_case(kind + "_width_64_segments", params,
                  {.heads = 1, .key_heads = 1, .width = 64, .cu_seqlens = {0, 100, 1290}}),
      linear_case(kind + "_width_128_segments", params,
                  {.heads = 2, .key_heads = 1, .width = 128, .cu_seqlens = {0, 1100}})};
  for (OpCase& op : cases) {
    op.forward_roundings = 4;
    op.backward_roundings = std::max(op.backward_roundings, 5.0);
    op.checked_elements = 2;
    op.types = {kernels::DType::f16, kernels::DType::bf16};
  }
  return cases;
}

// The state exceeds fp16's largest number.
OpCase large_state_case() {
  OpCase op = linear_case("plain_large_state", {.normalise = false},
                          {.heads = 1, .key_heads = 1, .width = 64, .cu_seqlens = {0, 1290}});
  for (auto& input : op.inputs) input.gradient = Gradient::none;
  op.inputs[2].offset = 100;
  op.backward = {};
  op.forward_roundings = 4;
  return op;
}

}  // namespace

std::vector<OpCase> linear_attention_cases() {
  std::vector<OpCase> cases;
  for (const bool normalise : {true, false}) {
    const LinearAttentionParams params{.normalise = normalise};
    const std::string kind = normalise ? "normalised" : "plain";
    cases.push_back(linear_case(kind + "_one_sequence", params,
                                {.heads = 2, .key_heads = 2, .width = 8, .cu_seqlens = {0, 9}}));
    cases.push_back(
        linear_case(kind + "_packed_ragged", params,
                    {.heads = 2, .key_heads = 1, .width = 4, .cu_seqlens = {0, 1, 1, 6, 9}, .padding = 8}));
    cases.push_back(
        linear_case(kind + "_odd_width_groups", params,
                    {.heads = 4, .key_heads = 2, .width = 5, .cu_seqlens = {0, 3, 8}, .padding = 3}));
    // Over many rows v averages out: dq is small beside the do . o whose rounding it carries.
    OpCase chunks = linear_case(kind + "_three_chunks", params,
                                {.heads = 2, .key_heads = 1, .width = 2, .cu_seqlens = {0, 130}});
    if (normalise) chunks.backward_roundings *= 4;
    cases.push_back(std::move(chunks));
    for (OpCase& op : matrix_unit_cases(params, kind)) cases.push_back(std::move(op));
  }
  cases.push_back(large_state_case());
  // More rows than a grid dimension has blocks, and long enough to be cut into segments.
  OpCase many = linear_case("normalised_many_rows", {},
                            {.heads = 1, .key_heads = 1, .width = 2, .cu_seqlens = {0, 3, 66000}});
  many.backward_roundings *= 4;
  many.checked_elements = 2;
  many.types = {kernels::DType::f32};
  cases.push_back(std::move(many));
  return cases;
}

}  // namespace support
