#pragma once
// A piece of text from each checkpoint, so that a person sees the model learn.
#include <filesystem>

#include "configs/config.h"
#include "kernels/core/context.h"

namespace launch {

// Appends to RUN/samples.txt how the checkpoint continues the start of the first validation document. A
// failure is a warning: it must not end the training.
void append_sample(const configs::Config& config, const kernels::Context& ctx,
                   const std::filesystem::path& checkpoint);

}  // namespace launch
