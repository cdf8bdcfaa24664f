#include "kernels/ops/activation.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::Context;

OpCase empty_case(std::string name) {
  return {.operation = "activation", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
}

OpCase swiglu_case(std::string name, int64_t rows, int64_t width, int64_t padding) {
  OpCase op = empty_case(std::move(name));
  op.inputs = {{.name = "x",
                .shape = {rows, 2 * width},
                .gradient = Gradient::written,
                .scale = 3,
                .padding = padding}};
  op.outputs = {{.name = "y", .shape = {rows, width}, .padding = padding}};
  op.forward = [](const Context& ctx, const OpTensors& t) { kernels::swiglu(ctx, t["x"], t["y"]); };
  op.backward = [](const Context& ctx, const OpTensors& t) {
    kernels::swiglu_backward(ctx, t["dy"], t["x"], t["dx"]);
  };
  return op;
}

OpCase gelu_case(std::string name, int64_t rows, int64_t width, int64_t padding) {
  OpCase op = empty_case(std::move(name));
  op.inputs = {
      {.name = "x", .shape = {rows, width}, .gradient = Gradient::written, .scale = 3, .padding = padding}};
  op.outputs = {{.name = "y", .shape = {rows, width}, .padding = padding}};
  op.forward = [](const Context& ctx, const OpTensors& t) { kernels::gelu(ctx, t["x"], t["y"]); };
  op.backward = [](const Context& ctx, const OpTensors& t) {
    kernels::gelu_backward(ctx, t["dy"], t["x"], t["dx"]);
  };
  // exp(t) carries t's own rounding, |t| 2^-24, as far as 1 / (1 + exp(t)) still moves: |t| up to 16.
  op.sum_length = 16 + 16;
  return op;
}

// Two inputs of y's shape.
OpCase pair_case(std::string name, const char* a, const char* b, int64_t rows, int64_t width) {
  OpCase op = empty_case(std::move(name));
  op.inputs = {{.name = a, .shape = {rows, width}, .gradient = Gradient::written, .scale = 2},
               {.name = b, .shape = {rows, width}, .gradient = Gradient::written, .scale = 2}};
  op.outputs = {{.name = "y", .shape = {rows, width}}};
  return op;
}

OpCase silu_add_case(std::string name, int64_t rows, int64_t width) {
  OpCase op = pair_case(std::move(name), "x", "u", rows, width);
  op.forward = [](const Context& ctx, const OpTensors& t) { kernels::silu_add(ctx, t["x"], t["u"], t["y"]); };
  op.backward = [](const Context& ctx, const OpTensors& t) {
    support::copy(t["dy"], t["dx"]);
    kernels::silu_add_backward(ctx, t["dy"], t["u"], t["du"]);
  };
  return op;
}

OpCase add_case(std::string name, int64_t rows, int64_t width) {
  OpCase op = pair_case(std::move(name), "a", "b", rows, width);
  op.forward = [](const Context& ctx, const OpTensors& t) { kernels::add(ctx, t["a"], t["b"], t["y"]); };
  op.backward = [](const Context&, const OpTensors& t) {
    support::copy(t["dy"], t["da"]);
    support::copy(t["dy"], t["db"]);
  };
  return op;
}

}  // namespace

std::vector<OpCase> activation_cases() {
  return {
      swiglu_case("swiglu", 7, 32, 0),
      swiglu_case("swiglu_strided", 5, 37, 3),
      swiglu_case("swiglu_narrow", 3, 1, 2),
      swiglu_case("swiglu_threads", 120, 301, 0),
      large(swiglu_case("swiglu_many_rows", 66001, 4, 4)),
      large(swiglu_case("swiglu_rows_of_vectors", 33, 1032, 8)),
      large(gelu_case("gelu_many_rows", 66001, 3, 0)),
      gelu_case("gelu", 9, 40, 0),
      gelu_case("gelu_strided", 4, 21, 5),
      gelu_case("gelu_threads", 60, 601, 0),
      silu_add_case("silu_add", 6, 45),
      silu_add_case("silu_threads", 90, 400),
      add_case("add", 5, 19),
      add_case("add_threads", 130, 300),
  };
}

}  // namespace support
