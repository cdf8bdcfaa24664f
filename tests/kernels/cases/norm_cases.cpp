#include "kernels/ops/norm.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::Context;
using kernels::NormKind;
using kernels::NormParams;
using kernels::Tensor;

struct NormShape {
  int64_t rows, cols;
  int64_t padding = 0;
};

Tensor optional(const OpTensors& t, bool present, const char* name) { return present ? t[name] : Tensor{}; }

OpInput gain_input(const char* name, int64_t cols) {
  return {.name = name,
          .shape = {cols},
          .gradient = Gradient::accumulated,
          .gradient_type = Type::main,
          .scale = 0.5,
          .offset = 1};
}

OpOutput statistics_output(const NormShape& s, const NormParams& params) {
  return {
      .name = "statistics", .shape = {s.rows, params.groups, 2}, .type = Type::main, .differentiable = false};
}

// fp16 in, one rounding out: all between is fp32, its longest sum over a row (over all rows for the gain).
OpCase norm_case(std::string name, NormParams params, NormShape s, Type x_type, Gradient dx) {
  OpCase op{.operation = "norm", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const bool bias = params.kind == NormKind::layer;
  op.inputs = {{.name = "x",
                .shape = {s.rows, s.cols},
                .type = x_type,
                .gradient = dx,
                .gradient_type = x_type,
                .scale = 1.5,
                .offset = 0.3,
                .padding = s.padding},
               gain_input("gain", s.cols)};
  if (bias) op.inputs.push_back(gain_input("bias", s.cols));
  op.outputs = {{.name = "y", .shape = {s.rows, s.cols}, .padding = s.padding}, statistics_output(s, params)};
  op.forward = [=](const Context& ctx, const OpTensors& t) {
    kernels::norm(ctx, params, t["x"], t["gain"], optional(t, bias, "bias"), t["y"], t["statistics"]);
  };
  op.backward = [=](const Context& ctx, const OpTensors& t) {
    kernels::norm_backward(ctx, params, t["dy"], t["x"], t["gain"], t["statistics"], t["dx"],
                           dx == Gradient::accumulated, t["dgain"], optional(t, bias, "dbias"));
  };
  op.sum_length = 2 * (s.rows + s.cols);
  return op;
}

// The sum is rounded before the norm sees it: one more rounding forward. The backward then works from that
// rounded sum, which moves xhat where it stands and once more through its mean product, and the residual's
// gradient starts from a rounded one.
OpCase residual_case(std::string name, NormParams params, NormShape s) {
  OpCase op{.operation = "norm", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const bool bias = params.kind == NormKind::layer;
  op.inputs = {{.name = "residual", .shape = {s.rows, s.cols}, .gradient = Gradient::written},
               {.name = "branch", .shape = {s.rows, s.cols}, .gradient = Gradient::written},
               gain_input("gain", s.cols)};
  if (bias) op.inputs.push_back(gain_input("bias", s.cols));
  op.outputs = {{.name = "sum", .shape = {s.rows, s.cols}},
                {.name = "y", .shape = {s.rows, s.cols}},
                statistics_output(s, params)};
  op.forward = [=](const Context& ctx, const OpTensors& t) {
    kernels::residual_norm(ctx, params, t["residual"], t["branch"], t["gain"], optional(t, bias, "bias"),
                           t["sum"], t["y"], t["statistics"]);
  };
  op.backward = [=](const Context& ctx, const OpTensors& t) {
    support::copy(t["dsum"], t["dresidual"]);
    kernels::norm_backward(ctx, params, t["dy"], t["sum"], t["gain"], t["statistics"], t["dresidual"], true,
                           t["dgain"], optional(t, bias, "dbias"));
    support::copy(t["dresidual"], t["dbranch"]);
  };
  op.forward_roundings = 3;
  op.backward_roundings = 5;
  op.sum_length = 2 * (s.rows + s.cols);
  return op;
}

}  // namespace

std::vector<OpCase> norm_cases() {
  const NormParams rms{.kind = NormKind::rms}, layer{.kind = NormKind::layer};
  const NormParams rms_heads{.kind = NormKind::rms, .groups = 3};
  const NormParams layer_heads{.kind = NormKind::layer, .groups = 2, .eps = 1e-3f};
  return {
      norm_case("rms", rms, {.rows = 7, .cols = 40}, Type::compute, Gradient::written),
      norm_case("rms_strided", rms, {.rows = 6, .cols = 37, .padding = 5}, Type::compute,
                Gradient::accumulated),
      norm_case("rms_threads", rms, {.rows = 150, .cols = 257}, Type::compute, Gradient::written),
      norm_case("rms_heads_main", rms_heads, {.rows = 5, .cols = 3 * 24}, Type::main, Gradient::written),
      norm_case("layer", layer, {.rows = 9, .cols = 33}, Type::compute, Gradient::written),
      norm_case("layer_one_column_groups", {.kind = NormKind::layer, .groups = 5}, {.rows = 3, .cols = 5},
                Type::compute, Gradient::accumulated),
      norm_case("layer_heads_strided", layer_heads, {.rows = 4, .cols = 2 * 19, .padding = 1}, Type::main,
                Gradient::accumulated),
      // Every way a GPU spreads a row, and more rows than a grid's second dimension has.
      large(
          norm_case("rms_many_rows", rms, {.rows = 66003, .cols = 8}, Type::compute, Gradient::accumulated)),
      large(norm_case("layer_768", layer, {.rows = 75, .cols = 768}, Type::compute, Gradient::written)),
      large(norm_case("layer_1600", layer, {.rows = 37, .cols = 1600}, Type::compute, Gradient::accumulated)),
      large(norm_case("rms_4096_main", rms, {.rows = 19, .cols = 4096}, Type::main, Gradient::accumulated)),
      large(norm_case("layer_wide", layer, {.rows = 5, .cols = 9000}, Type::compute, Gradient::written)),
      large(norm_case("rms_head_rows", {.kind = NormKind::rms, .groups = 12}, {.rows = 301, .cols = 12 * 64},
                      Type::compute, Gradient::written)),
      large(residual_case("residual_768", layer, {.rows = 43, .cols = 768})),
      large(residual_case("residual_2048", rms, {.rows = 11, .cols = 2048})),
      residual_case("residual_rms", rms, {.rows = 8, .cols = 48}),
      residual_case("residual_layer", layer, {.rows = 5, .cols = 21}),
      residual_case("residual_threads", rms, {.rows = 70, .cols = 301}),
  };
}

}  // namespace support
