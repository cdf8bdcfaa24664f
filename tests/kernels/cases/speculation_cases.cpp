// Draws; the acceptance rules stand in tests/kernels/speculation_test.cpp. Weights are small integers and
// random numbers have few bits, so that no sum and no product is rounded.
#include "kernels/core/philox.h"
#include "kernels/ops/speculation.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

std::vector<double> integers(int64_t count, int most, uint64_t seed) {
  std::vector<double> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = kernels::philox(seed, kernels::Purpose::test, i)[0] % static_cast<uint32_t>(most);
  return values;
}

OpCase draw_case(std::string name, int64_t rows, int64_t vocabulary, int64_t drawn, int64_t padding) {
  OpCase op{.operation = "speculation", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  std::vector<double> chances = integers(rows * drawn, 256, 2);
  for (double& u : chances) u /= 256;
  op.inputs = {{.name = "x",
                .shape = {rows, vocabulary},
                .type = Type::f32,
                .values = integers(rows * vocabulary, 4, 1),
                .padding = padding},
               {.name = "u", .shape = {rows, drawn}, .type = Type::f32, .values = std::move(chances)}};
  op.outputs = {{.name = "tokens", .shape = {rows, drawn}, .type = Type::i32, .padding = padding}};
  op.forward = [](const kernels::Context& ctx, const OpTensors& t) {
    kernels::draw(ctx, t["x"], t["u"], t["tokens"]);
  };
  op.sum_length = 0;
  op.types = {kernels::DType::f32};
  return op;
}

}  // namespace

std::vector<OpCase> speculation_cases() {
  return {
      draw_case("few_words", 4, 3, 4, 0),
      draw_case("strided", 5, 131, 3, 3),
      draw_case("wide", 3, 5003, 10, 1),
      draw_case("very_many_rows", 65600, 3, 1, 0),
  };
}

}  // namespace support
