#include <cstring>

#include "kernels/ops/optimizer.h"
#include "tests/support/op_case.h"

namespace support {

namespace {

using kernels::OptimizerState;

// Bytes of a state, as values of a u8 input.
std::vector<double> state_values(const OptimizerState& state) {
  std::vector<uint8_t> bytes(sizeof(state));
  std::memcpy(bytes.data(), &state, sizeof(state));
  return {bytes.begin(), bytes.end()};
}

// One whole step over `count` parameters: matrices with decay, a frozen part, vectors without decay.
OpCase step_case(std::string name, int64_t count, float clip) {
  OpCase op{.operation = "optimizer", .name = std::move(name), .inputs = {}, .outputs = {}, .forward = {}};
  const OptimizerState start{.step = 12, .updates = 9, .loss_scale = 1024.0f, .clean_steps = 1999};
  op.inputs = {{.name = "old_weights", .shape = {count}},
               {.name = "old_master", .shape = {count}, .type = Type::main},
               {.name = "gradients", .shape = {count}, .type = Type::main, .scale = 512},
               {.name = "old_m", .shape = {count}, .type = Type::main, .scale = 0.1},
               {.name = "old_v", .shape = {count}, .type = Type::main, .scale = 0.01, .offset = 0.1},
               {.name = "old_state",
                .shape = {sizeof(OptimizerState)},
                .type = Type::u8,
                .values = state_values(start)}};
  op.outputs = {{.name = "weights", .shape = {count}},
                {.name = "master", .shape = {count}, .type = Type::main},
                {.name = "m", .shape = {count}, .type = Type::main},
                {.name = "v", .shape = {count}, .type = Type::main}};
  op.forward = [count, clip](const kernels::Context& ctx, const OpTensors& t) {
    TensorBuffer state(kernels::DType::u8, {sizeof(OptimizerState)}, ctx.device);
    copy(t["old_state"], state);
    for (const char* name : {"weights", "master", "m", "v"}) copy(t[std::string("old_") + name], t[name]);
    kernels::OptimizerBuffers buffers{t["weights"], t["master"], t["gradients"],
                                      t["m"],       t["v"],      state.tensor()};
    const int64_t half = count / 2, quarter = count / 4;
    const std::vector<kernels::Segment> segments = {
        {.begin = 0, .count = half, .decay = true},
        {.begin = half, .count = quarter, .trainable = false},
        {.begin = half + quarter, .count = count - half - quarter}};
    const kernels::AdamWParams params{.schedule = {.lr = 1e-2f, .warmup = 20, .total = 100}, .clip = clip};
    TensorBuffer normaliser(kernels::DType::f32, {1}, ctx.device);
    normaliser.set(0, 2.0);
    kernels::gradient_statistics(ctx, segments, normaliser, buffers);
    kernels::update_loss_scale(ctx, {}, buffers);
    kernels::adamw(ctx, segments, normaliser, params, buffers);
  };
  // About twenty fp32 operations per element, one after the other.
  op.sum_length = 20;
  return op;
}

}  // namespace

std::vector<OpCase> optimizer_cases() {
  return {step_case("step", 1003, 0.0f), step_case("step_clipped", 70001, 1.0f),
          step_case("step_unaligned_segments", 70002, 1.0f)};
}

}  // namespace support
