#include "kernels/ops/linear.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

struct LinearShape {
  int64_t rows, in, out;
  int64_t padding = 0;
};

kernels::LinearWeight weight_of(const OpTensors& t, bool bias) {
  return {.matrix = t["w"], .bias = bias ? t["bias"] : kernels::Tensor{}, .panels = {}};
}

// Forward, dx (written or accumulated) and dw of a linear layer; weights are scaled so that y is about one.
OpCase linear_case(std::string name, LinearShape s, bool bias, Type y_type, Gradient dx) {
  OpCase op{.operation = "linear", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  op.inputs = {{.name = "x", .shape = {s.rows, s.in}, .gradient = dx, .padding = s.padding},
               {.name = "w",
                .shape = {s.out, s.in},
                .gradient = Gradient::accumulated,
                .gradient_type = Type::main,
                .scale = 0.2}};
  if (bias)
    op.inputs.push_back(
        {.name = "bias", .shape = {s.out}, .gradient = Gradient::accumulated, .gradient_type = Type::main});
  op.outputs = {{.name = "y", .shape = {s.rows, s.out}, .type = y_type, .padding = s.padding}};
  op.forward = [bias](const kernels::Context& ctx, const OpTensors& t) {
    kernels::linear(ctx, t["x"], weight_of(t, bias), t["y"]);
  };
  op.sum_length = std::max({s.rows, s.in, s.out});
  op.checked_elements = s.rows * s.in * s.out < 100000 ? 160 : 12;
  // Logits are fp32; the gradient that comes back is of the compute type.
  if (y_type == Type::compute)
    op.backward = [bias, dx](const kernels::Context& ctx, const OpTensors& t) {
      kernels::linear_backward_input(ctx, t["dy"], t["w"], t["dx"], dx == Gradient::accumulated);
      kernels::linear_backward_weight(ctx, t["dy"], t["x"], t["dw"], bias ? t["dbias"] : kernels::Tensor{});
    };
  return op;
}

// The row-invariant kernel; its weights are packed from the same matrix.
OpCase rows_case(std::string name, LinearShape s, bool bias, Type y_type) {
  OpCase op = linear_case(std::move(name), s, bias, y_type, Gradient::written);
  op.backward = {};
  op.outputs.push_back(
      {.name = "panels",
       .shape = {(s.out + kernels::kPanelRows - 1) / kernels::kPanelRows, s.in, kernels::kPanelRows}});
  op.forward = [bias](const kernels::Context& ctx, const OpTensors& t) {
    kernels::Tensor panels = t["panels"];
    kernels::LinearWeight w = weight_of(t, bias);
    kernels::pack_panels(ctx, w.matrix, panels);
    w.panels = panels;
    kernels::linear(ctx, t["x"], w, t["y"]);
  };
  return op;
}

}  // namespace

std::vector<OpCase> linear_cases() {
  return {
      linear_case("plain", {.rows = 9, .in = 20, .out = 33}, false, Type::compute, Gradient::written),
      linear_case("bias_strided", {.rows = 7, .in = 40, .out = 70, .padding = 3}, true, Type::compute,
                  Gradient::accumulated),
      linear_case("logits", {.rows = 5, .in = 24, .out = 50}, true, Type::main, Gradient::written),
      linear_case("many_rows", {.rows = 150, .in = 96, .out = 130}, true, Type::compute, Gradient::written),
      linear_case("long_sum", {.rows = 40, .in = 1100, .out = 48}, false, Type::compute,
                  Gradient::accumulated),
      rows_case("rows_one", {.rows = 1, .in = 64, .out = 100}, true, Type::compute),
      rows_case("rows_strided", {.rows = 5, .in = 37, .out = 257, .padding = 5}, false, Type::compute),
      rows_case("rows_logits", {.rows = 17, .in = 48, .out = 130}, true, Type::main),
      rows_case("rows_most", {.rows = 64, .in = 33, .out = 64}, false, Type::compute),
  };
}

}  // namespace support
