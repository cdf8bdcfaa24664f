#include "kernels/ops/sampling.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::Context;

OpCase sampling_case(std::string name, int64_t rows, int64_t vocabulary, int64_t padding, Type logits) {
  OpCase op{.operation = "sampling", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const int64_t k = std::min<int64_t>(vocabulary, 7);
  op.inputs = {
      {.name = "logits", .shape = {rows, vocabulary}, .type = logits, .scale = 3, .padding = padding}};
  op.outputs = {{.name = "tokens", .shape = {rows}, .type = Type::i32},
                {.name = "p", .shape = {rows, vocabulary}, .type = Type::main, .padding = padding},
                {.name = "indices", .shape = {rows, k}, .type = Type::i32}};
  op.forward = [](const Context& ctx, const OpTensors& t) {
    kernels::argmax(ctx, t["logits"], t["tokens"]);
    kernels::probabilities(ctx, t["logits"], 0.8f, t["p"]);
    kernels::top_k(ctx, t["logits"], t["indices"]);
  };
  op.sum_length = vocabulary + 16;
  if (rows > 1000) op.types = {kernels::DType::f16};
  return op;
}

}  // namespace

std::vector<OpCase> sampling_cases() {
  return {
      sampling_case("compute", 9, 50, 0, Type::compute),
      sampling_case("main_strided", 5, 131, 3, Type::main),
      sampling_case("few_words", 4, 3, 0, Type::compute),
      sampling_case("threads", 30, 1201, 0, Type::main),
      sampling_case("wide", 3, 5003, 1, Type::compute),
      sampling_case("very_many_rows", 65600, 3, 0, Type::main),
  };
}

}  // namespace support
