#pragma once
// Causal linear attention with elu(x) + 1 (kernels/ops/linear_attention.h). attention.linear_normaliser:
// "sum" divides by the sum of the weights; "norm" keeps the un-normalised sums, which outgrow fp16, in fp32
// and normalises each head (RMSNorm with a gain).
#include "trainer/model/attention/attention.h"

namespace trainer {

std::unique_ptr<Attention> make_linear_attention(ParameterStore& store, const configs::Config& config,
                                                 const std::string& prefix);

}  // namespace trainer
