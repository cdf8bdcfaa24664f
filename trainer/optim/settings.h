#pragma once
// The optimizer's rules as the configuration states them.
#include "configs/config.h"
#include "kernels/ops/optimizer.h"

namespace trainer {

kernels::AdamWParams adamw_params(const configs::Config& config);
// fp16: dynamic, from loss_scale_initial. bf16 and fp32 need no scale: 1 and fixed, non-finite steps are
// still skipped.
kernels::LossScaleRules loss_scale_rules(const configs::Config& config);
kernels::OptimizerState initial_state(const configs::Config& config);
kernels::DType compute_dtype(const configs::Config& config);

}  // namespace trainer
