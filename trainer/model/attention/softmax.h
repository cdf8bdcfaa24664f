#pragma once
// Causal softmax attention; its memory is a cache of k and v (kernels/ops/softmax_attention.h).
#include "trainer/model/attention/attention.h"

namespace trainer {

std::unique_ptr<Attention> make_softmax_attention(ParameterStore& store, const configs::Config& config,
                                                  const std::string& prefix);

}  // namespace trainer
