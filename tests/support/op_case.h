#pragma once
// One table of operation cases. A row names an operation's inputs and outputs and calls it; the tests that
// loop over the table (tests/kernels/op_cases_test.cpp) need nothing else to check gradients against central
// differences in fp64, to compare fp16, bf16 and fp32 with fp64, to check that results do not depend on the
// number of threads, and to compare devices.
//
// To add an operation: write tests/kernels/cases/<op>_cases.cpp with `std::vector<OpCase> <op>_cases()`,
// declare it below and add it to all_op_cases() in tests/kernels/cases/all_op_cases.cpp.
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/arena.h"
#include "kernels/core/context.h"
#include "tests/support/tensor_buffer.h"

namespace support {

// An argument's type in a run whose compute type is fp16, bf16, fp32 or fp64: the compute type, its main type
// (fp32; fp64 for fp64) or one fixed type.
enum class Type { compute, main, f32, f64, i32, i64, u8 };
kernels::DType dtype_for(Type type, kernels::DType compute);

// Whether the backward makes a gradient of an input, and whether it writes (=) or adds to it (+=).
enum class Gradient { none, written, accumulated };

struct OpInput {
  std::string name;
  kernels::Shape shape;
  Type type = Type::compute;
  Gradient gradient = Gradient::none;
  Type gradient_type = Type::compute;
  std::vector<double> values = {};  // empty: seeded normal values, offset + scale * N(0, 1)
  double scale = 1, offset = 0;
  int64_t padding = 0;  // columns behind each row, filled with NaN; the gradient has them too
};

struct OpOutput {
  std::string name;
  kernels::Shape shape;
  Type type = Type::compute;
  bool differentiable = true;  // false for what is only saved for the backward
  int64_t padding = 0;
};

// The tensors of one run by name: inputs, outputs, and in the backward "d<output>" for every differentiable
// output and "d<input>" for every input with a gradient.
class OpTensors {
 public:
  const kernels::Tensor& operator[](std::string_view name) const;
  std::map<std::string, TensorBuffer, std::less<>> buffers;
};

struct OpCase {
  std::string operation;  // the header's stem: "linear" for kernels/ops/linear.h
  std::string name;       // unique within the operation; letters, digits and _
  std::vector<OpInput> inputs;
  std::vector<OpOutput> outputs;
  // Reads inputs, writes outputs (which hold NaN). An operation that works in place copies first
  // (support::copy).
  std::function<void(const kernels::Context&, const OpTensors&)> forward;
  // Reads inputs, outputs and output gradients, makes the input gradients. Empty: nothing to differentiate.
  std::function<void(const kernels::Context&, const OpTensors&)> backward = {};
  // Tolerance against fp64 on the same (rounded) inputs. With u the unit roundoff of an output's type (2^-11
  // fp16, 2^-8 bf16, 2^-24 fp32), M the largest magnitude in the tensor and r = roundings:
  //   |error| <= u |y| + (r - 1) u_compute M + sum_length * 2^-24 * M
  // roundings: how often a value on the way is rounded to the compute type, each weighted by how much it
  // moves the result; 1 = only when stored. sum_length: fp32 operations one after the other, usually the
  // longest sum.
  double forward_roundings = 1, backward_roundings = 1;
  int64_t sum_length = 16;
  // How many elements of each input are checked against central differences; fewer where a forward is slow.
  int64_t checked_elements = 160;
  // Compute types this row runs in besides fp64.
  std::vector<kernels::DType> types = {kernels::DType::f16, kernels::DType::bf16, kernels::DType::f32};
};

// A row whose forward takes too long for many gradient checks.
OpCase large(OpCase op);

// One case with memory, in one compute type. Inputs are rounded to `rounding`, so that an fp64 run can see
// exactly the numbers of an fp16 one. Each call is rehearsed first, as a plan would, then run for real.
class OpRun {
 public:
  OpRun(const OpCase& op, kernels::DType compute, kernels::DType rounding, kernels::Device device = {});
  void forward();   // poisons the outputs first
  void backward();  // poisons written gradients; accumulated ones start at initial_gradient()
  OpTensors& tensors() { return tensors_; }
  const TensorBuffer& buffer(const std::string& name) const { return tensors_.buffers.at(name); }
  // The values an accumulated gradient starts from.
  static std::vector<double> initial_gradient(const OpCase& op, size_t input);

 private:
  void run(const std::function<void(const kernels::Context&, const OpTensors&)>& call,
           const std::function<void()>& prepare);

  const OpCase& op_;
  kernels::DType compute_;
  kernels::Device device_;
  OpTensors tensors_;
};

// The rows of each operation, and all of them.
std::vector<OpCase> activation_cases();
std::vector<OpCase> cast_cases();
std::vector<OpCase> cross_entropy_cases();
std::vector<OpCase> embedding_cases();
std::vector<OpCase> linear_attention_cases();
std::vector<OpCase> linear_cases();
std::vector<OpCase> norm_cases();
std::vector<OpCase> optimizer_cases();
std::vector<OpCase> rotary_cases();
std::vector<OpCase> sampling_cases();
std::vector<OpCase> softmax_attention_cases();
std::vector<OpCase> speculation_cases();
std::vector<OpCase> all_op_cases();

}  // namespace support
