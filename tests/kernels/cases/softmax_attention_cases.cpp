#include "kernels/ops/softmax_attention.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::Context;

struct AttentionShape {
  int64_t heads, key_heads, width;
  std::vector<double> cu_seqlens;
  int64_t padding = 0;
};

// Backward: o is rounded on its way into do . o, a sum over the width, which moves dq and dk by up to
// u sum |do o| |k| / sqrt(D): about u times the width.
OpCase attention_case(std::string name, const AttentionShape& s) {
  const auto rows = static_cast<int64_t>(s.cu_seqlens.back());
  OpCase op{
      .operation = "softmax_attention", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  for (const char* input : {"q", "k", "v"})
    op.inputs.push_back({.name = input,
                         .shape = {rows, *input == 'q' ? s.heads : s.key_heads, s.width},
                         .gradient = Gradient::written,
                         .padding = s.padding});
  op.inputs.push_back({.name = "cu_seqlens",
                       .shape = {static_cast<int64_t>(s.cu_seqlens.size())},
                       .type = Type::i32,
                       .values = s.cu_seqlens});
  op.outputs = {{.name = "o", .shape = {rows, s.heads, s.width}, .padding = s.padding},
                {.name = "log_sum", .shape = {rows, s.heads}, .type = Type::main, .differentiable = false}};
  op.forward = [](const Context& ctx, const OpTensors& t) {
    kernels::softmax_attention(ctx, t["q"], t["k"], t["v"], t["cu_seqlens"], t["o"], t["log_sum"]);
  };
  op.backward = [](const Context& ctx, const OpTensors& t) {
    kernels::softmax_attention_backward(ctx, t["do"], t["q"], t["k"], t["v"], t["o"], t["log_sum"],
                                        t["cu_seqlens"], t["dq"], t["dk"], t["dv"]);
  };
  op.backward_roundings = 2 + static_cast<double>(s.width);
  op.sum_length = 4 * (s.width + rows);
  return op;
}

}  // namespace

std::vector<OpCase> softmax_attention_cases() {
  return {
      attention_case("one_sequence", {.heads = 2, .key_heads = 2, .width = 8, .cu_seqlens = {0, 9}}),
      attention_case("packed_ragged",
                     {.heads = 2, .key_heads = 1, .width = 4, .cu_seqlens = {0, 1, 1, 6, 9}, .padding = 8}),
      attention_case("odd_width_groups",
                     {.heads = 4, .key_heads = 2, .width = 5, .cu_seqlens = {0, 3, 8}, .padding = 3}),
      attention_case("two_tiles", {.heads = 1, .key_heads = 1, .width = 2, .cu_seqlens = {0, 67}}),
  };
}

}  // namespace support
