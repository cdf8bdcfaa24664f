#pragma once
// From hidden rows to a loss, a few rows of logits at a time, so that neither all logits of a batch nor those
// of two heads are ever alive at once.
//   loss_sum += sum_i weight_i CE(hidden_i E^T, target_i)
//   dhidden  += dlogits E,   dE += dlogits^T hidden        with dlogits seeded by `seed`; nothing when it is
//   empty
#include "trainer/model/linear.h"

namespace trainer {

// Rows of logits that are alive at once. On the CPU as many as stay in its caches; on a GPU as many as fit
// into 2 GiB, in equal parts: a product of thousands of rows fills it, and each part passes over dE once
// more.
int64_t logit_rows(const kernels::Device& device, int64_t rows, int64_t vocabulary, kernels::DType dtype);

// hidden (N, C), targets (N) int32, weights (N) and seed (1) fp32, loss_sum (1) fp64; dhidden (N, C) may be
// empty.
void vocabulary_loss(const Context& ctx, const Linear& unembedding, const Tensor& hidden,
                     const Tensor& targets, const Tensor& weights, const Tensor& seed, Tensor loss_sum,
                     Tensor dhidden);

}  // namespace trainer
