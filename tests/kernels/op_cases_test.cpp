#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "kernels/core/parallel.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/op_case.h"

namespace {

using kernels::DType;
using support::Gradient;
using support::OpCase;
using support::OpRun;

const std::vector<OpCase>& cases() {
  static const std::vector<OpCase> all = support::all_op_cases();
  return all;
}

class OpCases : public testing::TestWithParam<size_t> {
 protected:
  const OpCase& op() const { return cases()[GetParam()]; }
};
class OpGradients : public OpCases {};

std::vector<size_t> differentiable_cases() {
  std::vector<size_t> indices;
  for (size_t i = 0; i < cases().size(); ++i)
    if (cases()[i].backward) indices.push_back(i);
  return indices;
}

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
    case DType::f32:
      return 0x1p-24;
    default:
      return 0x1p-53;
  }
}

double largest(const std::vector<double>& values) {
  double largest = 0;
  for (double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

// The scalar that gradients are checked on: the outputs projected on their given gradients.
double projection(OpRun& run, const OpCase& op) {
  run.forward();
  double sum = 0;
  for (const auto& out : op.outputs) {
    if (!out.differentiable) continue;
    const auto y = run.buffer(out.name).values(), dy = run.buffer("d" + out.name).values();
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
  }
  return sum;
}

// Central differences with step h err by h^2 f''' / 6 + 2^-53 |f| / h. With h = 1e-5 and terms of magnitude
// one that is 1e-10 + 1e-11 |f|; third derivatives and sums of up to a few hundred terms take it to 1e-7.
void check_gradient(OpRun& run, const OpCase& op, size_t input) {
  constexpr double kStep = 1e-5;
  const size_t checked = static_cast<size_t>(op.checked_elements);
  const auto& in = op.inputs[input];
  auto gradient = run.buffer("d" + in.name).values();
  if (in.gradient == Gradient::accumulated) {
    const auto start = OpRun::initial_gradient(op, input);
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] -= start[i];
  }
  const double tolerance = 1e-6 * (1 + largest(gradient));
  auto& buffer = run.tensors().buffers.at(in.name);
  const auto x = buffer.values();
  // An odd stride visits every column of any even width.
  const size_t stride = x.size() <= checked ? 1 : (x.size() / checked) | 1;
  int failures = 0;
  for (size_t i = 0; i < x.size() && failures < 5; i += stride) {
    buffer.set(i, x[i] + kStep);
    const double above = projection(run, op);
    buffer.set(i, x[i] - kStep);
    const double below = projection(run, op);
    buffer.set(i, x[i]);
    const double expected = (above - below) / (2 * kStep);
    if (!(std::abs(gradient[i] - expected) <= tolerance)) {
      ADD_FAILURE() << "d" << in.name << "[" << i << "] is " << gradient[i] << ", central difference "
                    << expected;
      ++failures;
    }
  }
}

TEST_P(OpGradients, MatchCentralDifferences) {
  kernels::set_threads(1);
  OpRun run(op(), DType::f64, DType::f64);
  run.forward();
  run.backward();
  for (size_t i = 0; i < op().inputs.size(); ++i)
    if (op().inputs[i].gradient != Gradient::none) check_gradient(run, op(), i);
  kernels::set_threads(0);
}

// |error| <= u |y| + (roundings - 1) u_compute M + sum_length 2^-24 M, and half of fp16's smallest subnormal.
void check_close(const OpCase& op, const std::string& name, const support::TensorBuffer& given,
                 const std::vector<double>& expected, DType compute, double roundings) {
  const auto y = given.values();
  const double u = unit_roundoff(given.tensor().dtype), scale = largest(expected);
  const double shared = (roundings - 1) * unit_roundoff(compute) * scale +
                        static_cast<double>(op.sum_length) * 0x1p-24 * scale + 0x1p-25;
  EXPECT_TRUE(given.padding_intact()) << name << " was written behind the end of a row";
  int failures = 0;
  for (size_t i = 0; i < y.size() && failures < 5; ++i)
    if (!(std::abs(y[i] - expected[i]) <= u * std::abs(expected[i]) + shared) && y[i] != expected[i]) {
      ADD_FAILURE() << name << "[" << i << "] is " << y[i] << " in " << name_of(compute) << ", "
                    << expected[i] << " in fp64; allowed " << u * std::abs(expected[i]) + shared;
      ++failures;
    }
}

void check_against_fp64(const OpCase& op, DType compute, kernels::Device device = {}) {
  OpRun run(op, compute, compute, device), oracle(op, DType::f64, compute);
  run.forward();
  oracle.forward();
  for (const auto& out : op.outputs)
    check_close(op, out.name, run.buffer(out.name), oracle.buffer(out.name).values(), compute,
                op.forward_roundings);
  if (!op.backward) return;
  run.backward();
  oracle.backward();
  for (const auto& in : op.inputs)
    if (in.gradient != Gradient::none)
      check_close(op, "d" + in.name, run.buffer("d" + in.name), oracle.buffer("d" + in.name).values(),
                  compute, op.backward_roundings);
}

TEST_P(OpCases, SmallTypesAgreeWithFp64) {
  support::with_each_instruction_set([&](const char* instructions) {
    SCOPED_TRACE(instructions);
    for (DType compute : op().types) check_against_fp64(op(), compute);
  });
}

// The tolerance of the CPU's rows: it is derived from roundings and the length of sums, whatever their order.
class CudaOpCases : public OpCases {};
TEST_P(CudaOpCases, AgreeWithFp64OnTheCpu) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  for (DType compute : op().types) {
    SCOPED_TRACE(kernels::name_of(compute));
    check_against_fp64(op(), compute, {kernels::Device::Kind::cuda, 0});
  }
}

std::vector<std::vector<char>> result_bytes(const OpCase& op, DType compute, int threads) {
  kernels::set_threads(threads);
  OpRun run(op, compute, compute);
  std::vector<std::vector<char>> bytes;
  run.forward();
  for (const auto& out : op.outputs) bytes.push_back(run.buffer(out.name).bytes());
  if (!op.backward) return bytes;
  run.backward();
  for (const auto& in : op.inputs)
    if (in.gradient != Gradient::none) bytes.push_back(run.buffer("d" + in.name).bytes());
  return bytes;
}

TEST_P(OpCases, ResultsDoNotDependOnThreads) {
  auto types = op().types;
  types.push_back(DType::f64);
  for (DType compute : types) {
    const auto one = result_bytes(op(), compute, 1);
    for (int threads : {2, 3})
      EXPECT_TRUE(result_bytes(op(), compute, threads) == one) << threads << " threads, " << name_of(compute);
  }
  kernels::set_threads(0);
}

std::string case_name(const testing::TestParamInfo<size_t>& info) {
  return cases()[info.param].operation + "_" + cases()[info.param].name;
}
INSTANTIATE_TEST_SUITE_P(Table, OpCases, testing::Range(size_t{0}, cases().size()), case_name);
INSTANTIATE_TEST_SUITE_P(Table, CudaOpCases, testing::Range(size_t{0}, cases().size()), case_name);
INSTANTIATE_TEST_SUITE_P(Table, OpGradients, testing::ValuesIn(differentiable_cases()), case_name);

TEST(OpCaseTable, EveryOperationHasARow) {
  std::set<std::string> rows;
  for (const auto& op : cases()) rows.insert(op.operation);
  const std::set<std::string> descriptions = {"decode_rows"};  // a data structure, not an operation
  for (const auto& file : std::filesystem::directory_iterator(FORETELL_SOURCE "/kernels/ops")) {
    if (file.path().extension() != ".h" || descriptions.count(file.path().stem())) continue;
    EXPECT_TRUE(rows.count(file.path().stem()))
        << file.path() << " has no row in the table of operation cases";
  }
}

}  // namespace
