#pragma once
// From hidden rows to a loss, a few rows of logits at a time, so that neither all logits of a batch nor those
// of two heads are ever alive at once.
//   loss_sum += sum_i weight_i CE(hidden_i E^T, target_i)
//   dhidden  += dlogits E,   dE += dlogits^T hidden        with dlogits seeded by `seed`; nothing when it is
//   empty
#include "trainer/model/linear.h"

namespace trainer {

inline constexpr int64_t kLogitRows = 512;

// hidden (N, C), targets (N) int32, weights (N) and seed (1) fp32, loss_sum (1) fp64; dhidden (N, C) may be
// empty.
void vocabulary_loss(const Context& ctx, const Linear& unembedding, const Tensor& hidden,
                     const Tensor& targets, const Tensor& weights, const Tensor& seed, Tensor loss_sum,
                     Tensor dhidden);

}  // namespace trainer
