#pragma once
// Embedding lookup.
//   forward    y[i] = E[tokens[i]] (+ P[positions[i]])
//   backward   dE[tokens[i]] += dy[i], dP[positions[i]] += dy[i]
// E (V, C), P (T, C) or empty, tokens and positions (N) int32; gradients are of the main type. On the CPU
// rows are summed in order of i, whatever the number of threads; on a GPU in an order that depends on the
// indices alone, with working memory from ctx.scratch. A negative token yields a zero row in the forward and
// no gradient: heads use it where a sequence has ended. An index beyond its table is an error; on a GPU its
// row is NaN, and it has no gradient.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void embedding(const Context& ctx, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y);
void embedding_backward(const Context& ctx, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table);

namespace cpu {
void embedding(const Context& ctx, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y);
void embedding_backward(const Context& ctx, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table);
}  // namespace cpu

namespace cuda {
void embedding(const Context& ctx, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y);
void embedding_backward(const Context& ctx, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table);
}  // namespace cuda

}  // namespace kernels
