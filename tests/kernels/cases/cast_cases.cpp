#include "kernels/ops/cast.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

OpCase cast_case(std::string name, Type from, Type to, kernels::Shape shape, int64_t padding) {
  OpCase op{.operation = "cast", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  op.inputs = {{.name = "x", .shape = shape, .type = from, .padding = padding}};
  op.outputs = {{.name = "y", .shape = shape, .type = to, .padding = padding}};
  op.forward = [](const kernels::Context& ctx, const OpTensors& t) { kernels::cast(ctx, t["x"], t["y"]); };
  op.sum_length = 0;
  return op;
}

}  // namespace

std::vector<OpCase> cast_cases() {
  OpCase fill{.operation = "cast", .name = "fill", .inputs = {}, .outputs = {}, .forward = {}};
  fill.outputs = {{.name = "y", .shape = {33, 11}, .padding = 2}};
  fill.forward = [](const kernels::Context& ctx, const OpTensors& t) { kernels::fill(ctx, t["y"], 0.3f); };
  return {
      cast_case("to_main", Type::compute, Type::main, {7, 5, 3}, 0),
      cast_case("to_compute", Type::main, Type::compute, {70001}, 0),
      cast_case("strided", Type::main, Type::compute, {50, 13}, 3),
      cast_case("many_rows", Type::main, Type::compute, {66001, 4}, 4),
      cast_case("from_f64", Type::f64, Type::compute, {41, 9}, 0),
      cast_case("to_f64", Type::compute, Type::f64, {41, 9}, 1),
      fill,
  };
}

}  // namespace support
