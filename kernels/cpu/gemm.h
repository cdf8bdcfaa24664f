#pragma once
// General matrix product with sums in fp32 (fp64 for fp64).
//   c (M, N) = op(a) op(b) + bias, or c += op(a) op(b), without a bias     op(a) (M, K), op(b) (K, N)
// a and b of one type; c of that type or its main type, rounded once. The result does not depend on the
// number of threads.
#include "kernels/core/tensor.h"

namespace kernels::cpu {

struct Operand {
  const Tensor& matrix;
  bool transposed = false;
  int64_t rows() const { return transposed ? matrix.cols() : matrix.rows(); }
  int64_t cols() const { return transposed ? matrix.rows() : matrix.cols(); }
};

// c = op(a) op(b) + bias, or c += op(a) op(b), which takes no bias.
void gemm(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c);

}  // namespace kernels::cpu
