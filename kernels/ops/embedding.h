#pragma once
// Embedding lookup.
//   forward    y[i] = E[tokens[i]] (+ P[positions[i]])     E (V, C), P (T, C) or empty, tokens and positions
//   (N) int32 backward   dE[tokens[i]] += dy[i], dP[positions[i]] += dy[i]     main type; rows are summed in
//   order of i, so the
//              result does not depend on the number of threads
// A negative token yields a zero row in the forward and no gradient: heads use it where a sequence has ended.
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

}  // namespace kernels
