#include "kernels/ops/rotary.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

std::vector<double> some_positions(int64_t rows) {
  std::vector<double> positions(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) positions[static_cast<size_t>(i)] = static_cast<double>(i * 37 % 1500);
  return positions;
}

OpCase rotary_case(std::string name, kernels::Shape shape, float theta) {
  OpCase op{.operation = "rotary", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  op.inputs = {
      {.name = "x", .shape = shape, .gradient = Gradient::written},
      {.name = "positions", .shape = {shape[0]}, .type = Type::i32, .values = some_positions(shape[0])}};
  op.outputs = {{.name = "y", .shape = shape}};
  op.forward = [=](const kernels::Context& ctx, const OpTensors& t) {
    support::copy(t["x"], t["y"]);
    kernels::rotary(ctx, t["y"], t["positions"], theta);
  };
  op.backward = [=](const kernels::Context& ctx, const OpTensors& t) {
    support::copy(t["dy"], t["dx"]);
    kernels::rotary(ctx, t["dx"], t["positions"], theta, -1);
  };
  return op;
}

}  // namespace

std::vector<OpCase> rotary_cases() {
  return {
      rotary_case("heads", {6, 3, 32}, 10000.0f),
      rotary_case("odd_half", {5, 2, 14}, 500.0f),
      rotary_case("smallest", {4, 1, 2}, 10000.0f),
      large(rotary_case("many_rows", {66001, 1, 4}, 10000.0f)),
      large(rotary_case("many_heads", {40, 25, 128}, 10000.0f)),
      rotary_case("threads", {150, 2, 64}, 10000.0f),
  };
}

}  // namespace support
