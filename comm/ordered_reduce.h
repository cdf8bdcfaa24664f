#pragma once
// out[i] = parts[0][i] + parts[1][i] + ... (or the maximum), strictly in that order. out may be one of parts.
#include <span>

#include "comm/communicator.h"

namespace comm {

void ordered_reduce(kernels::DType dtype, Reduce op, std::span<const void* const> parts, void* out,
                    int64_t count);

}  // namespace comm
