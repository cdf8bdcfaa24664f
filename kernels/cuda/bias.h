#pragma once
// What a matrix product's own epilogue does not do for a bias.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels::cuda {

// y (N, O) = bias (O) in every row, in y's type.
void copy_to_rows(const Context& ctx, const Tensor& bias, Tensor y);
// sums (O) fp32 += the sum over the rows of dy (N, O), in fp32 and a fixed order.
void add_column_sums(const Context& ctx, const Tensor& dy, Tensor sums);

}  // namespace kernels::cuda
