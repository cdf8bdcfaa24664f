#pragma once
// The table of `foretell plan` and `foretell train --dry-run`.
#include "configs/config.h"
#include "kernels/core/context.h"

namespace launch {

// `vocabulary` 0 takes it from data.path, or supposes 2048 where nothing has been prepared.
void print_plan(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx);

}  // namespace launch
