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

// Forward and backward of a linear layer; weights are scaled so that y is about one. `gradients`: whether
// those of x and W are written or accumulated.
OpCase linear_case(std::string name, LinearShape s, bool bias, Type y_type, Gradient gradients) {
  OpCase op{.operation = "linear", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  op.inputs = {{.name = "x", .shape = {s.rows, s.in}, .gradient = gradients, .padding = s.padding},
               {.name = "w",
                .shape = {s.out, s.in},
                .gradient = gradients,
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
    op.backward = [bias, gradients](const kernels::Context& ctx, const OpTensors& t) {
      const bool accumulate = gradients == Gradient::accumulated;
      kernels::linear_backward_input(ctx, t["dy"], t["w"], t["dx"], accumulate);
      kernels::linear_backward_weight(ctx, t["dy"], t["x"], t["dw"], bias ? t["dbias"] : kernels::Tensor{},
                                      accumulate);
    };
  return op;
}

// The row-invariant kernel; its weights are packed from the same matrix.
OpCase rows_case(std::string name, LinearShape s, bool bias, Type y_type) {
  OpCase op = linear_case(std::move(name), s, bias, y_type, Gradient::written);
  op.backward = {};
  op.forward = [bias](const kernels::Context& ctx, const OpTensors& t) {
    const kernels::ArenaScope scope(*ctx.scratch);
    kernels::LinearWeight w = weight_of(t, bias);
    kernels::Tensor panels = ctx.scratch->allocate("panels", w.matrix.dtype, kernels::panels_shape(w.matrix));
    kernels::pack_panels(ctx, w.matrix, panels);
    w.panels = panels;
    kernels::linear(ctx, t["x"], w, t["y"]);
  };
  return op;
}

// An MLP: the layer ahead of its gelu and the gradient of the layer behind it are the fused operations.
OpCase gelu_case(std::string name, LinearShape s, bool bias) {
  OpCase op{.operation = "linear", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const auto weight = [](std::string weight_name, kernels::Shape shape) {
    return OpInput{.name = std::move(weight_name),
                   .shape = shape,
                   .gradient = Gradient::accumulated,
                   .gradient_type = Type::main,
                   .scale = 0.2};
  };
  op.inputs = {{.name = "x", .shape = {s.rows, s.in}, .gradient = Gradient::written, .padding = s.padding},
               weight("w", {s.out, s.in}),
               weight("behind", {s.in, s.out})};
  if (bias) op.inputs.push_back(weight("bias", {s.out}));
  op.outputs = {
      {.name = "pre", .shape = {s.rows, s.out}, .differentiable = false, .padding = s.padding},
      {.name = "activated", .shape = {s.rows, s.out}, .differentiable = false, .padding = s.padding},
      {.name = "y", .shape = {s.rows, s.in}, .padding = s.padding}};
  op.forward = [bias](const kernels::Context& ctx, const OpTensors& t) {
    kernels::linear_gelu(ctx, t["x"], weight_of(t, bias), t["pre"], t["activated"]);
    kernels::linear(ctx, t["activated"], {t["behind"], {}, {}}, t["y"]);
  };
  op.backward = [bias](const kernels::Context& ctx, const OpTensors& t) {
    const kernels::ArenaScope scope(*ctx.scratch);
    const kernels::Tensor dpre = ctx.scratch->allocate("dpre", t["pre"].dtype, t["pre"].shape);
    kernels::linear_backward_input_gelu(ctx, t["dy"], t["behind"], t["pre"], dpre);
    kernels::linear_backward_weight(ctx, t["dy"], t["activated"], t["dbehind"]);
    kernels::linear_backward_weight(ctx, dpre, t["x"], t["dw"]);
    if (bias) kernels::linear_backward_bias(ctx, dpre, t["dbias"]);
    kernels::linear_backward_input(ctx, dpre, t["w"], t["dx"]);
  };
  // Rounded on the way: pre, activated; and pre, the gradient behind the gelu, dpre. Each weighs about one.
  op.forward_roundings = 3;
  op.backward_roundings = 5;
  op.sum_length = std::max({s.rows, s.in, s.out}) + 16;
  op.checked_elements = 40;
  return op;
}

// Decoding's form of it: nothing saved, row-invariant.
OpCase rows_gelu_case(std::string name, LinearShape s) {
  OpCase op = rows_case(std::move(name), s, true, Type::compute);
  op.forward = [](const kernels::Context& ctx, const OpTensors& t) {
    const kernels::ArenaScope scope(*ctx.scratch);
    kernels::LinearWeight w = weight_of(t, true);
    kernels::Tensor panels = ctx.scratch->allocate("panels", w.matrix.dtype, kernels::panels_shape(w.matrix));
    kernels::pack_panels(ctx, w.matrix, panels);
    w.panels = panels;
    kernels::linear_gelu(ctx, t["x"], w, {}, t["y"]);
  };
  op.forward_roundings = 2;
  return op;
}

// A projection added to the residual stream, by one product or (rows of decoding) row-invariant.
OpCase add_case(std::string name, LinearShape s, bool bias, bool rows_alone) {
  OpCase op = linear_case(std::move(name), s, bias, Type::compute, Gradient::written);
  op.inputs.push_back({.name = "residual", .shape = {s.rows, s.out}, .padding = s.padding});
  op.backward = {};
  op.forward = [bias, rows_alone](const kernels::Context& ctx, const OpTensors& t) {
    const kernels::ArenaScope scope(*ctx.scratch);
    kernels::LinearWeight w = weight_of(t, bias);
    if (rows_alone) {
      w.panels = ctx.scratch->allocate("panels", w.matrix.dtype, kernels::panels_shape(w.matrix));
      kernels::pack_panels(ctx, w.matrix, w.panels);
    }
    kernels::linear_add(ctx, t["x"], w, t["residual"], t["y"]);
  };
  op.forward_roundings = 2;  // the product and the sum
  return op;
}

// Decoding's form with a norm ahead, which is computed with the layer or by itself.
OpCase rows_norm_case(std::string name, LinearShape s, bool layer, bool gelu) {
  OpCase op = rows_case(std::move(name), s, true, Type::compute);
  op.inputs.push_back({.name = "gain", .shape = {s.in}, .scale = 0.5, .offset = 1});
  op.inputs.push_back({.name = "shift", .shape = {s.in}});
  op.forward = [=](const kernels::Context& ctx, const OpTensors& t) {
    const kernels::ArenaScope scope(*ctx.scratch);
    kernels::LinearWeight w = weight_of(t, true);
    w.panels = ctx.scratch->allocate("panels", w.matrix.dtype, kernels::panels_shape(w.matrix));
    kernels::pack_panels(ctx, w.matrix, w.panels);
    w.norm = {{.kind = layer ? kernels::NormKind::layer : kernels::NormKind::rms, .eps = 1e-3f},
              t["gain"],
              layer ? t["shift"] : kernels::Tensor{},
              ctx.scratch->allocate("sums", kernels::main_dtype(w.matrix.dtype), {w.matrix.rows(), 2})};
    kernels::pack_norm(ctx, w, w.norm.sums);
    if (gelu)
      kernels::linear_gelu(ctx, t["x"], w, {}, t["y"]);
    else
      kernels::linear(ctx, t["x"], w, t["y"]);
  };
  op.forward_roundings = gelu ? 3 : 2;  // the norm, the sum
  op.sum_length = 2 * s.in;
  return op;
}

OpInput& input(OpCase& op, const std::string& name) {
  return *std::find_if(op.inputs.begin(), op.inputs.end(), [&](const OpInput& x) { return x.name == name; });
}

// Rows whose mean is eighty times their deviation.
OpCase far_from_zero(OpCase op) {
  input(op, "x").offset = 40;
  input(op, "x").scale = 0.5;
  return op;
}

// Rows of which one element is a million times the others, as channels of trained models are.
OpCase one_outlier(OpCase op) {
  OpInput& x = input(op, "x");
  for (int64_t i = 0; i < x.shape.numel(); ++i)
    x.values.push_back(i % x.shape[1] == 11 ? 1000 : (static_cast<double>(i * 37 % 101) - 50) / (50 << 10));
  return op;
}

// Panels enough for the form that a GPU has for them.
OpCase vocabulary() {
  OpCase op =
      rows_case("rows_vocabulary", {.rows = 19, .in = 40, .out = 9603, .padding = 8}, true, Type::main);
  op.types = {kernels::DType::f16};
  return op;
}

// More panels than a GPU's blocks take at once.
OpCase rounds(OpCase op) {
  op.types = {kernels::DType::f16};
  return op;
}

// More rows than a GPU's grid has in its second dimension.
OpCase very_many_rows() {
  OpCase op = linear_case("very_many_rows", {.rows = 65600, .in = 3, .out = 2}, true, Type::compute,
                          Gradient::written);
  op.checked_elements = 2;
  op.types = {kernels::DType::f16};
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
      linear_case("aligned", {.rows = 64, .in = 128, .out = 96}, true, Type::compute, Gradient::written),
      very_many_rows(),
      vocabulary(),
      gelu_case("gelu", {.rows = 24, .in = 32, .out = 64}, true),
      gelu_case("gelu_odd", {.rows = 9, .in = 21, .out = 37, .padding = 3}, false),
      rows_case("rows_most", {.rows = 64, .in = 33, .out = 64}, false, Type::compute),
      rows_case("rows_long", {.rows = 9, .in = 1700, .out = 40}, true, Type::compute),
      rows_case("rows_longest", {.rows = 33, .in = 7000, .out = 17}, false, Type::main),
      rows_gelu_case("rows_gelu", {.rows = 3, .in = 64, .out = 50}),
      add_case("add", {.rows = 40, .in = 64, .out = 96}, true, false),
      add_case("add_odd", {.rows = 9, .in = 21, .out = 37, .padding = 3}, false, false),
      add_case("rows_add", {.rows = 5, .in = 40, .out = 70}, true, true),
      rows_norm_case("rows_norm", {.rows = 3, .in = 768, .out = 50}, true, false),
      rows_norm_case("rows_norm_part", {.rows = 21, .in = 168, .out = 37}, false, true),
      rows_norm_case("rows_norm_many", {.rows = 64, .in = 720, .out = 20, .padding = 8}, true, true),
      rows_norm_case("rows_norm_apart", {.rows = 5, .in = 37, .out = 33, .padding = 3}, true, false),
      rows_norm_case("rows_norm_long", {.rows = 33, .in = 1600, .out = 33}, true, false),
      far_from_zero(rows_norm_case("rows_norm_far", {.rows = 9, .in = 256, .out = 40}, true, false)),
      far_from_zero(rows_norm_case("rows_norm_far_rms", {.rows = 9, .in = 256, .out = 40}, false, false)),
      one_outlier(rows_norm_case("rows_norm_outlier", {.rows = 9, .in = 256, .out = 40}, true, false)),
      one_outlier(rows_norm_case("rows_norm_outlier_rms", {.rows = 9, .in = 256, .out = 40}, false, false)),
      rounds(rows_norm_case("rows_norm_rounds", {.rows = 20, .in = 72, .out = 3300}, true, false)),
      rounds(add_case("rows_add_rounds", {.rows = 19, .in = 776, .out = 1700}, true, true)),
      add_case("rows_add_long", {.rows = 19, .in = 1600, .out = 37, .padding = 3}, false, true),
  };
}

}  // namespace support
