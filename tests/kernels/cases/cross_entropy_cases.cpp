#include "kernels/ops/cast.h"
#include "kernels/ops/cross_entropy.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::Context;
using kernels::Tensor;

// A fifth of the rows has no target, another fifth has weight 0.
std::vector<double> some_targets(int64_t rows, int64_t vocabulary) {
  std::vector<double> targets(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i)
    targets[static_cast<size_t>(i)] = static_cast<double>(i % 5 == 3 ? -1 : i * 31 % vocabulary);
  return targets;
}

std::vector<double> some_weights(int64_t rows) {
  std::vector<double> weights(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i)
    weights[static_cast<size_t>(i)] = i % 5 == 1 ? 0 : 0.5 + 0.25 * static_cast<double>(i % 4);
  return weights;
}

double read(const Tensor& t) {
  double value;
  kernels::copy_bytes(&value, {}, t.data, t.device, sizeof(value));
  return value;
}

// The loss starts at "start"; the gradient is seeded with the loss's own gradient. The loss is held in fp64,
// its parts in fp32.
OpCase entropy_case(std::string name, int64_t rows, int64_t vocabulary, double scale, int64_t padding = 0) {
  OpCase op{
      .operation = "cross_entropy", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  op.inputs = {
      {.name = "logits",
       .shape = {rows, vocabulary},
       .gradient = Gradient::written,
       .scale = scale,
       .padding = padding},
      {.name = "targets", .shape = {rows}, .type = Type::i32, .values = some_targets(rows, vocabulary)},
      {.name = "weights", .shape = {rows}, .type = Type::f32, .values = some_weights(rows)},
      {.name = "start", .shape = {1}, .type = Type::f64, .values = {0.75}}};
  op.outputs = {{.name = "loss_sum", .shape = {1}, .type = Type::f64}};
  op.forward = [](const Context& ctx, const OpTensors& t) {
    support::copy(t["start"], t["loss_sum"]);
    kernels::cross_entropy(ctx, t["logits"], t["targets"], t["weights"], {}, t["loss_sum"]);
  };
  op.backward = [](const Context& ctx, const OpTensors& t) {
    kernels::cast(ctx, t["logits"], t["dlogits"]);
    support::copy(t["start"], t["loss_sum"]);
    TensorBuffer seed(kernels::DType::f32, {1}, ctx.device);
    seed.set(0, read(t["dloss_sum"]));
    kernels::cross_entropy(ctx, t["dlogits"], t["targets"], t["weights"], seed, t["loss_sum"]);
  };
  op.sum_length = vocabulary + 16;
  return op;
}

}  // namespace

std::vector<OpCase> cross_entropy_cases() {
  return {
      entropy_case("even", 8, 64, 2),
      entropy_case("odd", 11, 37, 1),
      entropy_case("two_words", 6, 2, 3),
      entropy_case("threads", 40, 1003, 4),
      entropy_case("padded", 9, 301, 3, 19),
      large(entropy_case("many_rows", 66001, 5, 3, 0)),
      large(entropy_case("gpt2", 5, 50257, 3, 47)),
      large(entropy_case("larger_than_shared_memory", 3, 130001, 3, 0)),
  };
}

}  // namespace support
