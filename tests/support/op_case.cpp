#include "tests/support/op_case.h"

#include <fmt/format.h>

#include <stdexcept>

#include "tests/support/rehearsed.h"

namespace support {

using kernels::DType;

namespace {

// Gradients of outputs: the random projection that makes one number of them. Stored in the output's type.
constexpr uint64_t kInputSeed = 100, kProjectionSeed = 200, kInitialSeed = 300;

std::vector<double> rounded(std::vector<double> values, DType dtype) {
  if (values.empty()) return values;
  TensorBuffer buffer(dtype, {static_cast<int64_t>(values.size())});
  buffer.set(values);
  return buffer.values();
}

bool is_float(Type type) {
  return type == Type::compute || type == Type::main || type == Type::f32 || type == Type::f64;
}

std::vector<double> initial_values(const OpInput& input, size_t index, DType rounding) {
  auto values = input.values;
  if (values.empty())
    values = normal_values(static_cast<size_t>(input.shape.numel()), kInputSeed + index, input.scale,
                           input.offset);
  return is_float(input.type) ? rounded(std::move(values), dtype_for(input.type, rounding)) : values;
}

}  // namespace

DType dtype_for(Type type, DType compute) {
  switch (type) {
    case Type::compute:
      return compute;
    case Type::main:
      return kernels::main_dtype(compute);
    case Type::f32:
      return DType::f32;
    case Type::f64:
      return DType::f64;
    case Type::i32:
      return DType::i32;
    case Type::i64:
      return DType::i64;
    case Type::u8:
      return DType::u8;
  }
  throw std::logic_error("unknown type");
}

OpCase large(OpCase op) {
  op.checked_elements = 2;
  return op;
}

const kernels::Tensor& OpTensors::operator[](std::string_view name) const {
  const auto found = buffers.find(name);
  if (found == buffers.end()) throw std::out_of_range(fmt::format("the case has no tensor '{}'", name));
  return found->second.tensor();
}

OpRun::OpRun(const OpCase& op, DType compute, DType rounding, kernels::Device device)
    : op_(op), compute_(compute), device_(device) {
  auto make = [&](const std::string& name, Type type, kernels::Shape shape,
                  int64_t padding) -> TensorBuffer& {
    return tensors_.buffers[name] = TensorBuffer(dtype_for(type, compute), shape, device, padding);
  };
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    const OpInput& in = op.inputs[i];
    make(in.name, in.type, in.shape, in.padding).set(initial_values(in, i, rounding));
    if (op.backward && in.gradient != Gradient::none)
      make("d" + in.name, in.gradient_type, in.shape, in.padding);
  }
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    const OpOutput& out = op.outputs[i];
    make(out.name, out.type, out.shape, out.padding);
    if (!op.backward || !out.differentiable) continue;
    const auto projection = normal_values(static_cast<size_t>(out.shape.numel()), kProjectionSeed + i);
    make("d" + out.name, out.type, out.shape, out.padding)
        .set(rounded(projection, dtype_for(out.type, rounding)));
  }
}

std::vector<double> OpRun::initial_gradient(const OpCase& op, size_t input) {
  return rounded(normal_values(static_cast<size_t>(op.inputs[input].shape.numel()), kInitialSeed + input),
                 DType::bf16);
}

void OpRun::run(const std::function<void(const kernels::Context&, const OpTensors&)>& call,
                const std::function<void()>& prepare) {
  const auto on_tensors = [&](const kernels::Context& ctx) { call(ctx, tensors_); };
  const Rehearsed rehearsed(device_, {}, on_tensors);
  prepare();
  on_tensors(rehearsed.ctx);
}

void OpRun::forward() {
  run(op_.forward, [&] {
    for (const OpOutput& out : op_.outputs) tensors_.buffers.at(out.name).poison();
  });
}

void OpRun::backward() {
  run(op_.backward, [&] {
    for (size_t i = 0; i < op_.inputs.size(); ++i) {
      if (op_.inputs[i].gradient == Gradient::none) continue;
      TensorBuffer& gradient = tensors_.buffers.at("d" + op_.inputs[i].name);
      gradient.poison();
      if (op_.inputs[i].gradient == Gradient::accumulated) gradient.set(initial_gradient(op_, i));
    }
  });
}

}  // namespace support
